"""How much do two workers help a sweep, and what does the sweep itself cost?

    python tests/benchmark_sweep.py [--smoke]

The same runs, each the training of a small network on random pictures with one thread, are
carried out by one worker and by two, in turn in one process, three times; the medians are
compared. The record goes to data/results/throughput. Run nothing else on the machine meanwhile:
the load before the start is part of the record, and what else is running lowers the ratio.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from bdutils import results, sweep
from bdutils.data import Pictures, TrainingSet
from bdutils.images import PictureClassifier, PictureSettings
from bdutils.training import train

RUNS, PICTURES, EPOCHS, REPEATS, BAR = 8, 2000, 3, 3, 1.7


@dataclass(frozen=True)
class Training:
    """One run."""

    seed: int
    pictures: int
    epochs: int

    @property
    def name(self) -> str:
        return f"seed{self.seed}"


def perform(study: str, run: Training, benchmark: Path | None = None) -> dict:
    """Train, and say how long it took."""
    start = time.perf_counter()
    chance = torch.Generator().manual_seed(run.seed)
    pixels = torch.randint(0, 256, (run.pictures, 1, 28, 28), generator=chance).byte()
    labels = tuple(torch.randint(0, 10, (run.pictures,), generator=chance).tolist())
    rows = TrainingSet(Pictures(pixels), labels, tuple(f"class {k}" for k in range(10)))
    report = train(PictureClassifier.new(10, channels=1, network="small", seed=run.seed), rows,
                   PictureSettings(epochs=run.epochs, seed=run.seed))
    return results.record(
        study=study, name=run.name, method="clean", task="random", scale="small",
        settings={"threads": torch.get_num_threads()}, data="0" * 16, seed=run.seed,
        command="python tests/benchmark_sweep.py", seconds={"training": report.seconds},
        metrics={"seconds": time.perf_counter() - start, "loss": report.losses[-1]})


def timed(workers: int, runs: list[Training]) -> tuple[float, float, list[float]]:
    """Return wall time, the share of the workers' time that was not spent in runs, the losses."""
    import benchmark_sweep  # by the name under which the workers know it

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ended = sweep.carry_out([("benchmark", run) for run in runs], folder=Path(folder),
                                perform=benchmark_sweep.perform, workers=workers)
        wall = time.perf_counter() - start
    made = sorted((found.record for found in ended), key=lambda record: record["seed"])
    assert len(made) == len(runs) and all(r["settings"]["threads"] == 1 for r in made)
    work = sum(r["metrics"]["seconds"] for r in made)
    return wall, 1 - work / (wall * workers), [r["metrics"]["loss"] for r in made]


def main(smoke: bool = False) -> dict:
    """Time both in turn and record the medians."""
    torch.set_num_threads(1)
    os.environ["BDUTILS_QUIET"] = "1"
    load, repeats = os.getloadavg()[0], 1 if smoke else REPEATS
    size = (200, 1) if smoke else (PICTURES, EPOCHS)
    runs = [Training(seed, *size) for seed in range(RUNS)]
    start = time.perf_counter()
    timed(2, [Training(seed, 200, 1) for seed in range(4)])  # warm-up: workers import torch
    starting, one, two = time.perf_counter() - start, [], []
    timed(1, [Training(0, 200, 1)])
    for _ in range(repeats):
        one.append(timed(1, runs))
        two.append(timed(2, runs))
        assert one[-1][2] == two[-1][2], "two workers computed something else"
    ratio = median(a[0] / b[0] for a, b in zip(one, two))
    made = results.record(
        study="throughput", name="sweep", method="sweep", task="random", scale="small",
        settings={"runs": RUNS, "pictures": size[0], "epochs": size[1], "repeats": repeats,
                  "cores": os.cpu_count(), "load_before": round(load, 2)},
        data="0" * 16, seed=0, command="python tests/benchmark_sweep.py",
        metrics={"two_workers_over_one": round(ratio, 2),
                 "overhead_one_worker": round(median(a[1] for a in one), 4),
                 # With two, the wait for the last run counts as well.
                 "overhead_two_workers": round(median(b[1] for b in two), 4)},
        seconds={"one_worker": median(a[0] for a in one), "starting_two_workers": starting,
                 "two_workers": median(b[0] for b in two)})
    print(made["metrics"], made["seconds"], f"load before {load:.2f}")
    print(f"{ratio:.2f} times the throughput; the bar is {BAR} on two idle cores")
    if not smoke:
        print(results.save(made).name)
    return made


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (
        str(Path(__file__).parent), str(Path(__file__).parent.parent),
        os.environ.get("PYTHONPATH"))))
    main("--smoke" in sys.argv)
