"""How fast is DUP's detector here, and how much memory does it take?

    python benchmarks/dup.py [--smoke]

Speed: ours and a direct reading of the authors' code, on the same victim and samples, in
turn in one process, three times; medians and scores are compared. Memory: up to 100,000 samples
go through a stand-in with as many states as MiniLM, each time in a fresh process (Linux only).
The records go to data/results/throughput; `--smoke` tries all on few samples and records nothing.
Run nothing else on the machine meanwhile.
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
from bdutils.defenses import detector as dt
from bdutils.defenses.base import stratified_split
from bdutils.defenses.detector import DetectorConfig
from bdutils.evaluation import victim
from bdutils.experiments import results
from bdutils.models.text import Classifier
from bdutils.roles import CleanSet, Examples

BATCH = 32  # of the authors
# The published form, at equal weights.
PUBLISHED = DetectorConfig(folds=1, choose="index", by_label=False, fuse="weighted")
TRAIN, REPEATS, AGREE = 1500, 3, 1e-5
SHARES, SEED = (0.4, 0.2, 0.4), 0  # of DUP
PHASES = ("forward", "statistics", "scores")
SIZES = {"ours": (1_000, 10_000, 100_000), "direct": (1_000, 10_000), "copied": (1_000, 10_000)}
WORDS = "bad good the a film plot cast is was very and long dull warm odd new old with".split()


class Timer(Stopwatch):
    """What is told apart here."""

    phases = PHASES


class Found(NamedTuple):
    """What a detector says of a training set: raw (n, 2) and fused (n,) scores, flags, layers."""

    raw: Tensor
    scores: Tensor
    indices: tuple[int, ...]
    layers: tuple[int, ...]


def ours(classifier: Classifier, parts: Sequence[Examples], chosen: DetectorConfig,
         timer: Timer) -> Found:
    """Detect by the functions of the chapter, with a timer on what they call."""
    stream, raw_scores, phase = dt.stream, dt.raw_scores, "statistics"

    def timed_stream(*given) -> Iterator[Tensor]:
        states = stream(*given)
        while True:
            timer.lap(phase)
            batch = next(states, None)
            timer.lap("forward")
            if batch is None:
                return
            yield batch

    def timed_scores(*given) -> Tensor:
        nonlocal phase
        timer.lap(phase)
        phase = "scores"  # to the end: first of threshold, then of training samples
        return raw_scores(*given)

    with patch.multiple(dt, stream=timed_stream, raw_scores=timed_scores):
        detector = dt.fit_detector(classifier, parts[0], chosen, parts[1])
        flags = dt.detect(classifier, detector, parts[2].inputs, parts[2].labels)
    timer.lap("scores")
    return Found(dt.in_pairs(flags.raw, flags.layers), flags.scores, flags.indices, flags.layers)


@torch.no_grad()
def batches(classifier: Classifier, samples: Examples, timer: Timer,
            copied: bool) -> Iterator[list[Tensor]]:
    """Yield the [CLS] states of 32 samples, layer by layer, in the order of the file."""
    for start in range(0, len(samples), BATCH):
        inputs = classifier.tokenizer(list(samples.inputs[start:start + BATCH]), padding=True,
                                      truncation=True, max_length=classifier.max_length,
                                      return_tensors="pt").to(classifier.model.device)
        run = classifier.model(**inputs, output_hidden_states=True)
        # On a CPU `.cpu()` copies nothing, so that each slice keeps the states of all tokens.
        states = [layer[:, 0].cpu() for layer in run.hidden_states[1:]]
        states = [layer.clone() for layer in states] if copied else states
        timer.lap("forward")
        yield states


def direct(classifier: Classifier, parts: Sequence[Examples], chosen: DetectorConfig,
           timer: Timer, copied: bool = False) -> Found:
    """Detect as the authors' code does: all states kept, two passes over all but calibration.

    As there, calibration samples are passed once, distances are taken batch by batch and singular
    values one by one. All is float64, which there is partly float32, so that scores can be equal.
    """
    classifier.model.eval()
    kept, means, precisions, index, raw = [], [], [], [], []
    for part in parts[1:]:  # first pass
        lists = zip(*batches(classifier, part, timer, copied))
        kept.append(np.stack([torch.cat(layer).double().numpy() for layer in lists]))
        timer.lap("scores")
    calibration = list(zip(*batches(classifier, parts[0], timer, copied)))
    for layer in calibration:
        states = np.vstack([batch.numpy() for batch in layer]).astype(np.float64)
        means.append(torch.from_numpy(states.mean(0)))
        fitted = ShrunkCovariance(shrinkage=chosen.shrinkage).fit(states)
        precisions.append(torch.from_numpy(fitted.precision_))
        index.append(calinski_harabasz_score(states, parts[0].labels))
    layers = sorted(range(len(index)), key=lambda i: -index[i])[:chosen.layers]
    timer.lap("statistics")
    for part, states in zip(parts[1:], kept):
        shares, far = [], []
        for i in range(len(part)):
            values = np.linalg.svd(np.diff(states[:, i], axis=0), compute_uv=False)
            shares.append(values[0] / values.sum() if values.sum() > 0 else 0.0)
        timer.lap("scores")
        for batch in batches(classifier, part, timer, copied):  # second pass
            off = {i: batch[i].double() - means[i] for i in layers}
            square = [torch.einsum("bi,ij,bj->b", off[i], precisions[i], off[i]) for i in layers]
            far += torch.stack(square).relu().sqrt().mean(0).tolist()
            timer.lap("scores")
        raw.append(np.stack([far, shares], 1))
    spread = raw[0].std(0)
    spread[spread < 1e-6] = 1
    clean, scanned = ((part - raw[0].mean(0)) / spread @ (chosen.weight, 1 - chosen.weight)
                      for part in raw)
    flagged = np.flatnonzero(scanned > np.percentile(clean, 100 * (1 - chosen.fpr)))
    timer.lap("scores")
    return Found(torch.from_numpy(raw[1]), torch.from_numpy(scanned), tuple(flagged.tolist()),
                 tuple(layers))


DETECTORS: dict[str, Callable[..., Found]] = {
    "ours": ours, "direct": direct, "copied": partial(direct, copied=True)}


def some(samples: Examples, n: int) -> Examples:
    """Take about n samples from all over a set, for clean ones are sorted by class."""
    return samples.take(range(0, len(samples), max(1, len(samples) // n)))


def speed(smoke: bool) -> dict:
    """Time both in turn and compare what they found."""
    task, chosen = load_task("sentiment", scale="small"), PUBLISHED
    attacked = victim(task, "badnets", poison_rate=0.2)
    clean = some(task.clean, 60) if smoke else task.clean
    parts = [*stratified_split(clean, SHARES, SEED)[:2],
             some(attacked.train, 100 if smoke else TRAIN)]
    seconds: dict[str, list[dict[str, float]]] = {"ours": [], "direct": []}
    for name in seconds:  # warm-up
        DETECTORS[name](attacked.classifier, [some(part, 16) for part in parts], chosen, Timer())
    largest = {"raw": 0.0, "fused": 0.0}
    for _ in range(1 if smoke else REPEATS):
        found = {}
        for name in seconds:
            timer = Timer()
            found[name] = DETECTORS[name](attacked.classifier, parts, chosen, timer)
            seconds[name].append(timer.seconds)
        one, two = found["ours"], found["direct"]
        # A fused score may be zero, so the largest of all is the measure of differences.
        gaps = {"raw": (one.raw - two.raw).abs() / two.raw.abs(),
                "fused": (one.scores - two.scores).abs() / two.scores.abs().max()}
        largest = {name: max(largest[name], gap.max().item()) for name, gap in gaps.items()}
        print(f"{len(one.indices)} of {len(parts[2])} samples flagged, layers {one.layers}, "
              f"largest differences {largest}", flush=True)
        assert one.layers == two.layers, f"layers {one.layers} and {two.layers}"
        assert max(largest.values()) <= AGREE, f"the scores differ: {largest}"
        assert one.indices == two.indices, "different samples are flagged"

    def speedup(*names: str) -> float:
        return round(median(sum(d[n] for n in names) / sum(o[n] for n in names)
                            for d, o in zip(seconds["direct"], seconds["ours"])), 2)

    medians = {f"{name}_{phase}": median(s[phase] for s in seconds[name])
               for name in seconds for phase in PHASES}
    return results.record(
        study="throughput", name="dup", method="dup", task="snippets", scale="small",
        settings={"calibration": len(parts[0]), "threshold": len(parts[1]), "train": len(parts[2]),
                  "layers": chosen.layers, "weight": chosen.weight, "direct_batch": BATCH,
                  "repeats": REPEATS},
        data=task.fingerprint(), seed=SEED, command="python benchmarks/dup.py",
        metrics={"speedup_over_direct": speedup(*PHASES),
                 "speedup_without_forward": speedup(*PHASES[1:]),
                 **{f"speedup_{phase}": speedup(phase) for phase in PHASES},
                 **{f"largest_{name}_difference": gap for name, gap in largest.items()},
                 "flagged": len(one.indices),
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


def made_samples(n: int) -> CleanSet:
    """Return samples of 4 to 6 words, the first of which tells the class."""
    rng = random.Random(0)
    texts = tuple(" ".join([WORDS[i % 2], *rng.choices(WORDS[2:], k=rng.randint(3, 5))])
                  for i in range(n))
    return CleanSet(texts, tuple(i % 2 for i in range(n)), ("bad", "good"))


def one_peak(kind: str, n: int) -> dict[str, float]:
    """Send n samples through a detector; return its peak above the start, and all, in MiB.

    The texts are made before the start. `getrusage` would count the parent process, too.
    """
    def mib(field: str) -> float:
        return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) / 1024

    samples, run = made_samples(n), partial(DETECTORS[kind], stand_in())
    parts = [samples.take(range(*ends)) for ends in  # each passes through ours once
             ((0, n // 2), (n // 2, 3 * n // 4), (3 * n // 4, n))]
    chosen, timer = PUBLISHED, Timer()
    run([part.take(range(64)) for part in parts], chosen, timer)  # what every run needs
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start, timer = mib("VmRSS"), Timer()
    run(parts, chosen, timer)
    return {"above_start": mib("VmHWM") - start, "peak": mib("VmHWM"),
            "seconds": sum(timer.seconds.values())}


def memory(smoke: bool) -> dict:
    """Measure peaks, and how many bytes a further sample costs."""
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
        low, high = counts[-2:]  # with few, ours has not yet held two full chunks
        growth = made[high]["above_start"] - made[low]["above_start"]
        metrics[f"{kind}_bytes_per_row"] = round(growth * 2**20 / (high - low))
    return results.record(
        study="throughput", name="dup-memory", method="dup", task="made", scale="small",
        settings={"samples": {kind: list(counts) for kind, counts in sizes.items()},
                  "layers": config.num_hidden_layers, "dims": config.hidden_size,
                  "intermediate": config.intermediate_size, "words": [4, 6]},
        data=made_samples(1000).fingerprint(), seed=0, command="python benchmarks/dup.py",
        metrics=metrics, seconds=seconds)


def main() -> None:
    """Run both parts, or what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true", help="few samples, no record")
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
