"""How fast is DUP's detector here, and how much memory does it take?

    python benchmarks/dup.py [--smoke]

Speed: ours and a direct reading of the authors' code, on the same victim and rows, in turn in
one process, three times; medians and scores are compared. Memory: up to 100,000 rows go through
a stand-in with as many states as MiniLM, each time in a fresh process (Linux only). The records
go to data/results/throughput; `--smoke` tries all on few rows and records nothing. Run nothing
else on the machine meanwhile.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from sklearn.covariance import ShrunkCovariance
from sklearn.metrics import calinski_harabasz_score
from stopwatch import Stopwatch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from bdutils.data import load_task
from bdutils.defenses import anomaly
from bdutils.defenses.mapping import split_reserved
from bdutils.evaluation import victim
from bdutils.experiments import results
from bdutils.models.text import Classifier
from bdutils.roles import Examples, ReservedSet

BATCH = 32  # of the authors
POOL, REPEATS, AGREE = 1500, 3, 1e-5
PHASES = ("forward", "statistics", "scores")
SIZES = {"ours": (1_000, 10_000, 100_000), "direct": (1_000, 10_000), "copied": (1_000, 10_000)}
WORDS = "bad good the a film plot cast is was very and long dull warm odd new old with".split()


class Watch(Stopwatch):
    """What is told apart here."""

    phases = PHASES


class Found(NamedTuple):
    """What a detector says of the pool: raw (n, 2) and fused (n,) scores, flags, layers."""

    raw: Tensor
    scores: Tensor
    rows: tuple[int, ...]
    layers: tuple[int, ...]


def ours(classifier: Classifier, parts: Sequence[Examples], chosen: anomaly.DetectorSettings,
         watch: Watch) -> Found:
    """Detect by the functions of the chapter, with a watch on what they call."""
    stream, raw_scores, phase = anomaly.stream, anomaly.raw_scores, "statistics"

    def timed_stream(*given) -> Iterator[Tensor]:
        states = stream(*given)
        while True:
            watch.lap(phase)
            batch = next(states, None)
            watch.lap("forward")
            if batch is None:
                return
            yield batch

    def timed_scores(*given) -> Tensor:
        nonlocal phase
        watch.lap(phase)
        phase = "scores"  # to the end: first of the threshold rows, then of the pool
        return raw_scores(*given)

    with patch.multiple(anomaly, stream=timed_stream, raw_scores=timed_scores):
        detector = anomaly.fit_detector(classifier, parts[0], parts[1], chosen)
        flags = anomaly.detect(classifier, detector, parts[2].texts)
    watch.lap("scores")
    return Found(flags.raw, flags.scores, flags.rows, detector.layers)


@torch.no_grad()
def batches(classifier: Classifier, rows: Examples, watch: Watch,
            copied: bool) -> Iterator[list[Tensor]]:
    """Yield the [CLS] states of 32 rows, layer by layer, in the order of the file."""
    for start in range(0, len(rows), BATCH):
        inputs = classifier.tokenizer(list(rows.texts[start:start + BATCH]), padding=True,
                                      truncation=True, max_length=classifier.max_length,
                                      return_tensors="pt").to(classifier.model.device)
        run = classifier.model(**inputs, output_hidden_states=True)
        # On a CPU `.cpu()` copies nothing, so that each slice keeps the states of all tokens.
        states = [layer[:, 0].cpu() for layer in run.hidden_states[1:]]
        states = [layer.clone() for layer in states] if copied else states
        watch.lap("forward")
        yield states


def direct(classifier: Classifier, parts: Sequence[Examples], chosen: anomaly.DetectorSettings,
           watch: Watch, copied: bool = False) -> Found:
    """Detect as the authors' code does: all states kept, two passes over threshold and pool rows.

    As there, calibration rows are passed once, distances are taken batch by batch and singular
    values row by row. All is float64, which there is partly float32, so that scores can be equal.
    """
    classifier.model.eval()
    kept, means, precisions, index, raw = [], [], [], [], []
    for rows in parts[1:]:  # first pass
        lists = zip(*batches(classifier, rows, watch, copied))
        kept.append(np.stack([torch.cat(layer).double().numpy() for layer in lists]))
        watch.lap("scores")
    calibration = list(zip(*batches(classifier, parts[0], watch, copied)))
    for layer in calibration:
        states = np.vstack([batch.numpy() for batch in layer]).astype(np.float64)
        means.append(torch.from_numpy(states.mean(0)))
        fitted = ShrunkCovariance(shrinkage=chosen.shrinkage).fit(states)
        precisions.append(torch.from_numpy(fitted.precision_))
        index.append(calinski_harabasz_score(states, parts[0].labels))
    layers = sorted(range(len(index)), key=lambda i: -index[i])[:chosen.layers]
    watch.lap("statistics")
    for rows, states in zip(parts[1:], kept):
        shares, far = [], []
        for row in range(len(rows)):
            values = np.linalg.svd(np.diff(states[:, row], axis=0), compute_uv=False)
            shares.append(values[0] / values.sum() if values.sum() > 0 else 0.0)
        watch.lap("scores")
        for batch in batches(classifier, rows, watch, copied):  # second pass
            off = {i: batch[i].double() - means[i] for i in layers}
            square = [torch.einsum("bi,ij,bj->b", off[i], precisions[i], off[i]) for i in layers]
            far += torch.stack(square).relu().sqrt().mean(0).tolist()
            watch.lap("scores")
        raw.append(np.stack([far, shares], 1))
    spread = raw[0].std(0)
    spread[spread < 1e-6] = 1
    clean, pool = ((part - raw[0].mean(0)) / spread @ (chosen.weight, 1 - chosen.weight)
                   for part in raw)
    flagged = np.flatnonzero(pool > np.percentile(clean, 100 * (1 - chosen.fpr)))
    watch.lap("scores")
    return Found(torch.from_numpy(raw[1]), torch.from_numpy(pool), tuple(flagged.tolist()),
                 tuple(layers))


DETECTORS: dict[str, Callable[..., Found]] = {
    "ours": ours, "direct": direct, "copied": partial(direct, copied=True)}


def some(rows: Examples, n: int) -> Examples:
    """Take about n rows from all over a set, for reserved rows are sorted by class."""
    return rows.take(range(0, len(rows), max(1, len(rows) // n)))


def speed(smoke: bool) -> dict:
    """Time both in turn and compare what they found."""
    task, chosen = load_task("sentiment", scale="small"), anomaly.DetectorSettings()
    attacked = victim(task, "badnets", poison_rate=0.2)
    reserved = some(task.reserved, 60) if smoke else task.reserved
    parts = [*split_reserved(reserved, chosen)[:2], some(attacked.train, 100 if smoke else POOL)]
    seconds: dict[str, list[dict[str, float]]] = {"ours": [], "direct": []}
    for name in seconds:  # warm-up
        DETECTORS[name](attacked.classifier, [some(part, 16) for part in parts], chosen, Watch())
    largest = {"raw": 0.0, "fused": 0.0}
    for _ in range(1 if smoke else REPEATS):
        found = {}
        for name in seconds:
            watch = Watch()
            found[name] = DETECTORS[name](attacked.classifier, parts, chosen, watch)
            seconds[name].append(watch.seconds)
        one, two = found["ours"], found["direct"]
        # A fused score may be zero, so the largest of all is the measure of differences.
        gaps = {"raw": (one.raw - two.raw).abs() / two.raw.abs(),
                "fused": (one.scores - two.scores).abs() / two.scores.abs().max()}
        largest = {name: max(largest[name], gap.max().item()) for name, gap in gaps.items()}
        print(f"{len(one.rows)} of {len(parts[2])} rows flagged, layers {one.layers}, largest "
              f"differences {largest}", flush=True)
        assert one.layers == two.layers, f"layers {one.layers} and {two.layers}"
        assert max(largest.values()) <= AGREE, f"the scores differ: {largest}"
        assert one.rows == two.rows, "different rows are flagged"

    def speedup(*names: str) -> float:
        return round(median(sum(d[n] for n in names) / sum(o[n] for n in names)
                            for d, o in zip(seconds["direct"], seconds["ours"])), 2)

    medians = {f"{name}_{phase}": median(s[phase] for s in seconds[name])
               for name in seconds for phase in PHASES}
    return results.record(
        study="throughput", name="dup", method="dup", task="snippets", scale="small",
        settings={"calibration": len(parts[0]), "threshold": len(parts[1]), "pool": len(parts[2]),
                  "layers": chosen.layers, "weight": chosen.weight, "direct_batch": BATCH,
                  "repeats": REPEATS},
        data=task.fingerprint(), seed=chosen.seed, command="python benchmarks/dup.py",
        metrics={"speedup_over_direct": speedup(*PHASES),
                 "speedup_without_forward": speedup(*PHASES[1:]),
                 **{f"speedup_{phase}": speedup(phase) for phase in PHASES},
                 **{f"largest_{name}_difference": gap for name, gap in largest.items()},
                 "flagged": len(one.rows),
                 # Some phases are shorter than the tenth of a second that `seconds` keep.
                 **{f"{name}_ms": round(1000 * value, 1) for name, value in medians.items()}},
        seconds={**medians, **{f"{name}_total": median(sum(s.values()) for s in seconds[name])
                               for name in seconds}})


def stand_in() -> Classifier:
    """Return random weights with the states of MiniLM, 6 layers of 384, but little work."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), hidden_size=384, num_hidden_layers=6,
                        num_attention_heads=6, intermediate_size=64, max_position_embeddings=16)
    return Classifier(BertForSequenceClassification(config).eval(),
                      BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}), 16)


def made_rows(n: int) -> ReservedSet:
    """Return rows of 4 to 6 words, the first of which tells the class."""
    rng = random.Random(0)
    texts = tuple(" ".join([WORDS[i % 2], *rng.choices(WORDS[2:], k=rng.randint(3, 5))])
                  for i in range(n))
    return ReservedSet(texts, tuple(i % 2 for i in range(n)), ("bad", "good"))


def one_peak(kind: str, n: int) -> dict[str, float]:
    """Send n rows through a detector; return its peak above the start and the process's, in MiB.

    The texts are made before the start. `getrusage` would count the parent process, too.
    """
    def mib(field: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024

    rows, run = made_rows(n), partial(DETECTORS[kind], stand_in())
    parts = [rows.take(range(*ends)) for ends in  # each row passes through ours once
             ((0, n // 2), (n // 2, 3 * n // 4), (3 * n // 4, n))]
    chosen, watch = anomaly.DetectorSettings(), Watch()
    run([part.take(range(64)) for part in parts], chosen, watch)  # what every run needs
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start, watch = mib("VmRSS"), Watch()
    run(parts, chosen, watch)
    return {"above_start": mib("VmHWM") - start, "peak": mib("VmHWM"),
            "seconds": sum(watch.seconds.values())}


def memory(smoke: bool) -> dict:
    """Measure peaks, and how many bytes a further row costs."""
    sizes = dict.fromkeys(SIZES, (400, 1200)) if smoke else SIZES
    metrics, seconds, config = {}, {}, stand_in().model.config
    for kind, counts in sizes.items():
        made = {}
        for n in counts:
            command = [sys.executable, __file__, "--peak", kind, str(n)]
            made[n] = json.loads(subprocess.run(command, check=True, text=True,
                                                stdout=subprocess.PIPE).stdout)
            print(kind, n, made[n], flush=True)
            metrics |= {f"{kind}_{name}_mib_{n}": round(made[n][name], 1)
                        for name in ("above_start", "peak")}
            seconds[f"{kind}_{n}"] = made[n]["seconds"]
        low, high = counts[-2:]  # with few rows, ours has not yet held two full chunks
        growth = made[high]["above_start"] - made[low]["above_start"]
        metrics[f"{kind}_bytes_per_row"] = round(growth * 2**20 / (high - low))
    return results.record(
        study="throughput", name="dup-memory", method="dup", task="made", scale="small",
        settings={"rows": {kind: list(counts) for kind, counts in sizes.items()},
                  "layers": config.num_hidden_layers, "dims": config.hidden_size,
                  "intermediate": config.intermediate_size, "words": [4, 6]},
        data=made_rows(1000).fingerprint(), seed=0, command="python benchmarks/dup.py",
        metrics=metrics, seconds=seconds)


def main() -> None:
    """Run both parts, or what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="few rows, no record")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # for the fresh processes
    chosen = parser.parse_args()
    if chosen.peak:
        print(json.dumps(one_peak(chosen.peak[0], int(chosen.peak[1]))))
        return
    for part in (speed, memory):
        made = part(chosen.smoke)
        print(made["metrics"], made["seconds"],
              "not recorded" if chosen.smoke else results.save(made).name, flush=True)


if __name__ == "__main__":
    main()
