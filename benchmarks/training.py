"""How fast is the training loop, beside a plain loop and beside the machine itself?

    python benchmarks/training.py

All three are timed in turn in one process, three times, and the medians are compared; the
record goes to data/results/throughput. Run nothing else on the machine meanwhile.
"""

import time
from statistics import median

import torch

from bdutils.data import load_task
from bdutils.experiments import results
from bdutils.models.text import Classifier
from bdutils.training import TrainConfig, train

SAMPLES, PADDED, REPEATS = 320, 128, 3


def plain_loop(classifier: Classifier, texts: list[str], labels: list[int], size: int) -> float:
    """Train one epoch as many scripts do: tokenize in the loop, pad every text to 128."""
    model = classifier.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.train()
    start = time.perf_counter()
    for at in range(0, len(texts), size):
        batch = classifier.tokenizer(texts[at:at + size], padding="max_length", truncation=True,
                                     max_length=PADDED, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor(labels[at:at + size])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def matrix_rate(size: int = 1024, repeats: int = 20) -> float:
    """Return the machine's own rate for float32 matrix products, in GFLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    start = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b)
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e9


def main() -> None:
    """Time the three in turn and record the medians."""
    task = load_task("sentiment", scale="small")
    samples = task.train.take(range(SAMPLES))
    training = TrainConfig(epochs=1, lr=1e-5)
    classifier = Classifier.new(2, dropout=0.0)
    weights = sum(p.numel() for n, p in classifier.model.named_parameters()
                  if "embeddings" not in n)
    measured: dict[str, list[float]] = {"ours": [], "plain": [], "gflops": [], "share": []}
    train(classifier, samples.take(range(64)), training)  # warm-up
    for _ in range(REPEATS):
        measured["gflops"].append(matrix_rate())
        report = train(classifier, samples, training)
        measured["ours"].append(report.seconds)
        measured["plain"].append(
            plain_loop(classifier, list(samples.inputs), list(samples.labels), 32))
        # Forward and backward cost 6 operations a weight and token; attention is left out.
        rate = 6 * weights * report.tokens / report.seconds / 1e9
        measured["share"].append(rate / measured["gflops"][-1])
    speedup = median(p / o for p, o in zip(measured["plain"], measured["ours"]))
    made = results.record(
        study="throughput", name="training", method="training", task="snippets", scale="small",
        settings={"samples": SAMPLES, "padded_to": PADDED, "repeats": REPEATS},
        data=task.fingerprint(), seed=0, command="python benchmarks/training.py",
        metrics={"speedup_over_plain_loop": round(speedup, 2),
                 "share_of_matrix_rate": round(median(measured["share"]), 3),
                 "matrix_gflops": round(median(measured["gflops"]), 1),
                 "tokens_per_second": round(report.tokens / median(measured["ours"]), 0)},
        seconds={"ours": median(measured["ours"]), "plain": median(measured["plain"])})
    print(made["metrics"], results.save(made).name)


if __name__ == "__main__":
    main()
