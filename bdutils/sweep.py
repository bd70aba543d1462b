"""Recorded studies: grids of runs that are too long for a page.

    python -m bdutils.sweep                 list the studies
    python -m bdutils.sweep attacks         run what is missing of one study
    python -m bdutils.sweep attacks --only badnets-rate0.1-seed0    one run
    python -m bdutils.sweep sst2 --benchmark FOLDER     files instead of the hub

Each run writes one JSON to data/results, whole or not at all; a run that is there is skipped.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from . import results, scale
from .attacks.text import TRIGGERS, ParaphraseTable, Trigger, paraphrases_from
from .data import load_task
from .metrics import cacc
from .training import TrainSettings
from .victims import Scores, evaluate, victim


@dataclass(frozen=True)
class Run:
    """One cell of a grid; `attack` None is the clean model, at rate 0."""

    task: str
    attack: str | None
    poison_rate: float
    seed: int
    label_mode: str = "dirty"

    @property
    def name(self) -> str:
        """Return the file name of the run's record."""
        mode = "" if self.label_mode == "dirty" else f"-{self.label_mode}"
        return f"{self.attack or 'clean'}{mode}-rate{self.poison_rate:g}-seed{self.seed}"


def grid(task: str, attacks: list[str], rates: list[float], seeds: list[int],
         label_mode: str = "dirty") -> list[Run]:
    """Return the clean run and every attack at every rate, for each seed.

    Args: task, attacks, rates, seeds: the axes; label_mode: of the poisoning.
    Source: ours.
    """
    cells = [(None, 0.0, "dirty"), *itertools.product(attacks, rates, [label_mode])]
    return [Run(task, attack, rate, seed, mode)
            for seed in seeds for attack, rate, mode in cells]


FOUR = list(TRIGGERS)
STUDIES: dict[str, list[Run]] = {
    "attacks": grid("sentiment", FOUR, [0.1], [0, 1, 2]),
    "topic": grid("topic", ["badnets", "addsent"], [0.1], [0]),
    "rates": [*grid("sentiment", ["badnets", "syntax"], [0.0025, 0.01, 0.05, 0.1], [0]),
              *grid("sentiment", ["syntax"], [0.05], [1, 2])],
    "label-modes": [Run("sentiment", "badnets", 0.1, 0, "clean"),
                    Run("sentiment", "badnets", 0.1, 0, "mixed"),
                    Run("sentiment", "syntax", 0.1, 0, "clean")],
    "sst2": grid("sst2", FOUR, [0.2, 0.05], [0]),
}
# One pass over the 6,920 rows of SST-2 is as many steps as two over the small set.
EPOCHS = {"sst2": 1}
BENCHMARK_ATTACKS = {"style": "style_bible", "syntax": "syntactic_scpn"}


def perform(study: str, run: Run, benchmark: Path | None = None) -> dict:
    """Train, measure and describe one run.

    Args: study: its name; run: the cell; benchmark: folder with the files `TASK.parquet` and,
        if rewriting attacks shall use real paraphrases, `TASK_paraphrases.parquet`.
    Returns: the record, not yet saved.
    Source: ours.
    """
    task = load_task(str(benchmark / f"{run.task}.parquet") if benchmark else run.task,
                     sizes=None if benchmark is None else {"train": None, "test": None})
    changes = {"epochs": EPOCHS[study]} if study in EPOCHS and scale() == "small" else {}
    settings = TrainSettings.at(seed=run.seed, **changes)
    clean = victim(task, None, settings=settings)
    attacked, start = clean, time.perf_counter()
    if run.attack:
        trigger = _trigger(run, benchmark)
        attacked = victim(task, trigger, settings=settings, poison_rate=run.poison_rate,
                          label_mode=run.label_mode, seed=run.seed)
        start = time.perf_counter()
        # A table of real paraphrases has no test rows of the target class, which PACC needs.
        metrics = _metrics(evaluate(attacked.classifier, task, trigger, 1, clean.classifier,
                                    every_class=not isinstance(trigger, ParaphraseTable)))
    else:
        metrics = {"cacc": cacc(clean.classifier.predict(task.test.texts), task.test.labels)}
    measuring = time.perf_counter() - start
    where = " --benchmark FOLDER" if benchmark else ""
    return results.record(
        study=study, name=run.name, method=run.attack or "clean", task=task.name,
        scale=scale(), data=task.fingerprint(), seed=run.seed, metrics=metrics,
        settings={"poison_rate": run.poison_rate, "label_mode": run.label_mode,
                  "target_label": 1, "trigger": repr(attacked.truth.trigger)
                  if attacked.truth else None, **asdict(settings)},
        seconds={"training": attacked.report.seconds, "measuring": measuring},
        command=f"python -m bdutils.sweep {study} --only {run.name}{where}")


def _trigger(run: Run, benchmark: Path | None) -> Trigger:
    table = benchmark / f"{run.task}_paraphrases.parquet" if benchmark else None
    if table and table.is_file() and run.attack in BENCHMARK_ATTACKS:
        return paraphrases_from(str(table), BENCHMARK_ATTACKS[run.attack])
    return TRIGGERS[run.attack]


def _metrics(scores: Scores) -> dict:
    found = {name: rate for name, rate in vars(scores).items() if rate is not None}
    return {**found, "excess_asr": scores.asr.value - scores.floor.value}


def missing(study: str, only: str | None = None, folder: Path | None = None) -> Iterator[Run]:
    """Yield the runs of a study that have no record yet.

    Args: study: its name; only: one run's name, yielded in any case; folder: of the results.
    Raises: ValueError for an unknown study or run.
    Source: ours.
    """
    if study not in STUDIES:
        raise ValueError(f"unknown study {study!r}: there are {sorted(STUDIES)}")
    runs = [run for run in STUDIES[study] if only in (None, run.name)]
    if not runs:
        raise ValueError(f"study {study!r} has no run {only!r}")
    for run in runs:
        path = (folder or results.FOLDER) / study / f"{run.name}.json"
        if only or not path.is_file():
            yield run


def main() -> None:
    """Run the command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bdutils.sweep")
    parser.add_argument("study", nargs="?", help="leave out to list the studies")
    parser.add_argument("--only", help="name of one run")
    parser.add_argument("--benchmark", type=Path, help="folder with TASK.parquet files")
    parser.add_argument("--results", type=Path, help="folder for the records")
    chosen = parser.parse_args()
    if not chosen.study:
        for name, runs in STUDIES.items():
            print(f"{name}: {len(runs)} runs")
        return
    for run in missing(chosen.study, chosen.only, chosen.results):
        made = perform(chosen.study, run, chosen.benchmark)
        results.save(made, chosen.results)
        shown = {k: f"{results.value(made, k):.3f}" for k in made["metrics"]}
        print(run.name, shown, f"{made['seconds']['training']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
