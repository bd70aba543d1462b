"""Recorded studies: grids of runs that are too long for a page.

`run` says how one of them is made, and `bdutils.sweep` carries them out.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from ..attacks.image import IMAGE_TRIGGERS
from ..attacks.text import TEXT_TRIGGERS


@dataclass(frozen=True)
class Run:
    """One cell of a grid; `attack` None is the clean model, at rate 0."""

    task: str
    """Name of the data set, or of one for each scale."""
    attack: str | None
    """Name of the trigger, None for a clean model."""
    poison_rate: float
    """Share of the training samples, 0 to 1."""
    seed: int
    """Of poisoning, training and defense."""
    label_mode: str = "dirty"
    """See `PoisonConfig`."""
    defense: str = ""
    """Name of one of `VARIANTS`; empty to measure the attack alone."""
    encoder: str | None = None
    """See `models.encoder_source`."""

    @property
    def name(self) -> str:
        """Return the file name of the run's record."""
        mode = "" if self.label_mode == "dirty" else f"-{self.label_mode}"
        end = f"-{self.defense}" if self.defense else ""
        return f"{self.attack or 'clean'}{mode}-rate{self.poison_rate:g}-seed{self.seed}{end}"


def grid(task: str, attacks: list[str], rates: list[float], seeds: list[int],
         label_mode: str = "dirty") -> list[Run]:
    """Return the clean run and every attack at every rate, for each seed.

    Args:
        task, attacks, rates, seeds: The axes.
        label_mode: Of the poisoning.
    """
    cells = [(None, 0.0, "dirty"), *itertools.product(attacks, rates, [label_mode])]
    return [Run(task, attack, rate, seed, mode)
            for seed in seeds for attack, rate, mode in cells]


def defended(defense: str, task: str, attacks: list[str], rates: list[float],
             seeds: list[int] = [0]) -> list[Run]:  # noqa: B006
    """Return every attack at every rate, for each seed, with one defense.

    Args:
        defense: Of `VARIANTS`.
        task: As for `grid`.
        attacks: As for `grid`, without the clean model.
        rates, seeds: As for `grid`.
    """
    return [Run(task, attack, rate, seed, defense=defense)
            for seed in seeds for attack, rate in itertools.product(attacks, rates)]


FOUR = list(TEXT_TRIGGERS)
FIVE = [name for name in IMAGE_TRIGGERS if name not in ("label_consistent", "narcissus")]
# Label-consistent poison takes four fifths of the target class, about a tenth of all samples.
LABEL_CONSISTENT = [Run("images", "label_consistent", 0.08, seed, "clean") for seed in (0, 1, 2)]
# Which attacks a clean model is measured on: with a defender's samples, is its floor the same?
ON_CLEAN = {"sentiment": grid("sentiment", FOUR, [0.2], [0])[1:],
            "images": [*grid("images", FIVE, [0.1], [0])[1:], LABEL_CONSISTENT[0]]}
# What needs no network of the attacker's.
PLAIN = [name for name in FIVE if name != "input_aware"]
NARCISSUS_RATE = 0.05  # half of the target class, whose labels stay
CIFAR = [*grid("cifar10", FIVE, [0.1], [0]), Run("cifar10", "label_consistent", 0.08, 0, "clean")]
STUDIES: dict[str, list[Run]] = {
    "attacks": grid("sentiment", FOUR, [0.1], [0, 1, 2]),
    "topic": grid("topic", ["badnets", "addsent"], [0.1], [0]),
    "rates": [*grid("sentiment", ["badnets", "synbkd"], [0.0025, 0.01, 0.05, 0.1], [0]),
              *grid("sentiment", ["synbkd"], [0.05], [1, 2])],
    "label-modes": [Run("sentiment", "badnets", 0.1, 0, "clean"),
                    Run("sentiment", "badnets", 0.1, 0, "mixed"),
                    Run("sentiment", "synbkd", 0.1, 0, "clean")],
    "sst2": grid("sst2", FOUR, [0.2, 0.05], [0]),
    "bedkd": [*defended("bedkd", "sentiment", FOUR, [0.2], [0, 1, 2]),
              *(Run("sentiment", None, 0.0, seed, defense="bedkd") for seed in (0, 1, 2)),
              Run("sentiment", None, 0.0, 0, defense="bedkd-forced")],
    "bedkd-rates": [*defended("bedkd", "sentiment", ["badnets", "addsent", "synbkd"], [0.05]),
                    *defended("bedkd", "sentiment", ["badnets", "addsent"], [0.01])],
    "bedkd-parts": [run for name in ("fine-tuning", "trust", "random", "retraining")
                    for run in defended(name, "sentiment", ["badnets"], [0.2])],
    "bedkd-deviations": [run for name in ("ours", "unbounded", "padding-counts",
                                          "one-optimizer", "whole-epochs")
                         for run in defended(name, "sentiment", ["badnets"], [0.2])],
    "bedkd-authors": defended("bedkd-authors", "sentiment", ["badnets"], [0.2]),
    "bedkd-breaks": [*defended("bedkd", "sentiment", ["several"], [0.2]),
                     *defended("bedkd", "topic8", ["badnets"], [0.2])],
    "bedkd-topic": defended("bedkd", "topic", ["badnets", "addsent"], [0.2]),
    "bedkd-sst2": defended("bedkd", "sst2", FOUR, [0.2]),
    "bedkd-ag-news": defended("bedkd", "ag_news", FOUR, [0.2]),
    "dup": [*defended("dup", "sentiment", FOUR, [0.2], [0, 1, 2]),
            *(Run("sentiment", None, 0.0, seed, defense="dup") for seed in (0, 1, 2)),
            Run("sentiment", None, 0.0, 0, defense="dup-forced")],
    "dup-rates": [run for name in ("dup", "dup-forced") for run in (
        *defended(name, "sentiment", ["badnets"], [0.05]),
        *defended(name, "sentiment", ["addsent"], [0.01]))],
    "dup-deviations": [*defended("dup-authors", "sentiment", FOUR, [0.2]),
                       *(run for name in (
                           "lora", "dup-unstopped", "dup-no-unlikelihood", "dup-uncapped",
                           "dup-batch-32", "dup-fast", "dup-forced", "dup-one-set",
                           "dup-all-unlearned")
                         for run in defended(name, "sentiment", ["badnets"], [0.2]))],
    # What most people would do with the flags.
    "dup-retraining": [replace(run, defense="dup-retraining")
                       for run in grid("sentiment", FOUR, [0.2], [0, 1, 2])],
    "dup-topic": defended("dup", "topic", ["badnets"], [0.2]),
    "dup-sst2": defended("dup", "sst2", FOUR, [0.2]),
    "dup-ag-news": defended("dup", "ag_news", FOUR, [0.2]),
    "dup-causal": [Run("sentiment", "badnets", 0.2, 0, defense="dup-causal", encoder="causal")],
    "images": [*grid("images", FIVE, [0.1], [0, 1, 2]), *LABEL_CONSISTENT],
    "images-rates": [Run("images", attack, rate, 0) for attack in ("badnets", "sig", "wanet")
                     for rate in (0.0025, 0.01, 0.03)],
    "images-clean-label": [Run("images", "sig", 0.08, seed, "clean") for seed in (0, 1, 2)],
    "images-cifar10": CIFAR,
    "ntml": [replace(run, defense="ntml") for run in (
        *grid("images", FIVE, [0.1], [0, 1, 2]), *LABEL_CONSISTENT)],
    "baselines": [replace(run, defense=name)
                  for name in ("ft", "fp", "nad", "ft_sam", "ibau")
                  for run in (*grid("images", FIVE, [0.1], [0, 1, 2]), *LABEL_CONSISTENT)],
    "baselines-long": [run for name in ("ft-long", "fp-long", "nad-long")
                       for run in defended(name, "images", ["badnets"], [0.1])],
    "ntml-counts": [run for count in (25, 50, 250, 500)
                    for run in defended(f"ntml-{count}", "images", ["badnets"], [0.1])],
    # Each step's effect on every attack, then our other choices.
    "ntml-choices": [
        *(replace(run, defense=name) for name in (
            "ntml-relabel", "ntml-global", "ntml-drop", "ntml-alone")
          for run in (*grid("images", PLAIN, [0.1], [0]), LABEL_CONSISTENT[0])),
        *(run for name in ("ntml-raw", "ntml-gate-3", "ntml-go-on")
          for run in defended(name, "images", ["badnets", "blended"], [0.1]))],
    "ntml-rates": [run for name in ("ntml", "ntml-relabel")
                   for run in defended(name, "images", ["badnets", "sig"], [0.01, 0.03])],
    "ntml-adaptive": [*defended("ntml", "images", ["decoy"], [0.1], [0, 1, 2]),
                      *defended("ntml-relabel", "images", ["decoy"], [0.1])],
    # These two are of the form of the first records.
    "ntml-text": defended("ntml-relabel", "sentiment", ["badnets"], [0.2]),
    "ntml-cifar10": [replace(run, defense="ntml-relabel") for run in CIFAR],
    "baselines-cifar10": [replace(run, defense=name)
                          for name in ("ft", "fp", "nad")
                          for run in CIFAR],
    "baselines-text": [replace(run, defense=name)
                       for name in ("ft-text", "ft_sam-text", "onion", "strip-text")
                       for run in grid("sentiment", FOUR, [0.2], [0, 1, 2])],
    "references": [Run(task, None, 0.0, seed, defense=name) for seed in (0, 1, 2)
                   for task, name in (("sentiment", "ft-text"), ("images", "ft"))],
    "filters": [replace(run, defense="strip") for run in (
        *grid("images", FIVE, [0.1], [0, 1, 2]), *LABEL_CONSISTENT)],
    "baselines-train": [replace(run, defense=name)
                        for name in ("spectral", "ac", "abl", "clp", "ft_sweep")
                        for run in (*grid("images", FIVE, [0.1], [0, 1, 2]), *LABEL_CONSISTENT)],
    "baselines-train-text": [replace(run, defense=name)
                             for name in ("spectral", "ac", "cube")
                             for run in grid("sentiment", FOUR, [0.2], [0, 1, 2])],
    "sweep-text": defended("ft_sweep-text", "sentiment", ["badnets"], [0.2]),
}
# What each defense needs is in its own study at the usual rate; here only what can be repaired,
# since an input filter does not change how the model behind it learns.
_LEARNERS = {"images": ("", "ft", "fp", "nad", "ft_sam", "ibau", "bedkd-images", "ntml"),
             "sentiment": ("", "ft-text", "ft_sam-text", "bedkd", "dup")}
_LOW = ("ft", "fp", "nad", "ft_sam", "ibau", "strip", "bedkd-images")
STUDIES |= {
    "bedkd-images": [replace(run, defense="bedkd-images") for run in (
        *grid("images", FIVE, [0.1], [0, 1, 2]), *LABEL_CONSISTENT)],
    # With all 800 clean texts or 100 images they are in their own studies.
    "clean-counts": [
        *(run for count in (50, 100, 200, 400) for name in ("bedkd", "dup", "ft-text")
          for run in defended(f"{name}-{count}", "sentiment", ["addsent"], [0.2])),
        *(run for count in (25, 500, 2500) for name in ("ft", "fp", "nad", "ft_sam", "ibau")
          if (name, count) != ("ibau", 2500)  # its time grows with the images
          for run in defended(f"{name}-{count}", "images", ["badnets"], [0.1])),
        *(run for name in ("ft_sweep-2500", "anew-2500", "ft-brief-2500", "ft-steps-100")
          for run in defended(name, "images", ["badnets"], [0.1])),
        *defended("ft_sweep-2500", "images", ["blended", "sig", "wanet"], [0.1]),
        *defended("ft-2500", "images", ["badnets"], [0.1], [1, 2]),
        *(run for name in ("ft-2500", "ft_sam-2500")
          for run in defended(name, "images", ["blended", "sig"], [0.1]))],
    # The first seed of a chapter's own method is in its own study.
    "low-rate": [
        *(run for name in _LOW for run in defended(name, "images", ["sig"], [0.01], [0, 1, 2])),
        *defended("ntml", "images", ["sig"], [0.01], [1, 2]),
        *(run for name in ("ft-text", "ft_sam-text", "onion", "strip-text")
          for run in defended(name, "sentiment", ["addsent"], [0.01], [0, 1, 2])),
        *(run for name in ("bedkd", "dup")
          for run in defended(name, "sentiment", ["addsent"], [0.01], [1, 2]))],
    # Attackers who know BeDKD and DUP; whom NT-ML meets is in `ntml-adaptive`.
    "adaptive": [run for name in ("bedkd", "dup")
                 for run in defended(name, "sentiment", ["low_confidence", "hidden"], [0.2],
                                     [0, 1, 2])],
    # Triggers that no choice of this book has seen: chosen when the defenses were settled.
    "unseen": [
        *(run for name in ("bedkd", "dup", "ft-text")
          for run in defended(name, "sentiment", ["homographs"], [0.2], [0, 1, 2])),
        *(run for name in ("ntml", "ibau", "ft_sam", "strip")
          for run in defended(name, "images", ["quantized"], [0.1], [0, 1, 2]))],
    "relearning": [
        *(run for name in _LEARNERS["images"]
          for run in defended(name, "images", ["badnets"], [0.1], [0, 1, 2])),
        *(run for name in _LEARNERS["sentiment"]
          for run in defended(name, "sentiment", ["badnets"], [0.2], [0, 1, 2]))],
}

# The first run at scale `full`, of the forms that the methods had then.
_ATTACKED = [Run("sst2", attack, 0.2, 0, encoder="mpnet") for attack in FOUR]
STUDIES |= {
    "sst2-base-first": [
        *(replace(run, defense=name) for name in (
            "", "bedkd", "dup", "ft-text", "ft_sam-text", "onion", "strip-text")
          for run in _ATTACKED),
        *(Run("sst2", None, 0.0, 0, defense=name, encoder="mpnet")
          for name in ("", "bedkd", "dup"))],
    # Without Input-Aware, whose networks held no numbers, as we suspect: see chapter 9.
    "cifar10-resnet18-first": [*grid("cifar10", PLAIN, [0.1], [0]),
                               *defended("ntml", "cifar10", PLAIN, [0.1])],
}
# Scale `full`, on a GPU; see `benchmarks/gpu.py`. The base encoder comes from a registry.
THREE = [0, 1, 2]
SST2_BASE = [replace(run, encoder="mpnet") for run in grid("sst2", FOUR, [0.2], THREE)]
AG_NEWS_BASE = [replace(run, encoder="mpnet")
                for run in grid("ag_news", ["badnets", "addsent"], [0.2], THREE)]
RESNET18 = [*grid("cifar10", FIVE, [0.1], THREE),
            *(Run("cifar10", "label_consistent", 0.08, seed, "clean") for seed in THREE),
            *(Run("cifar10", "narcissus", NARCISSUS_RATE, seed, "clean") for seed in THREE)]
LARGE = {
    "sst2-base": SST2_BASE,
    "ag-news-base": AG_NEWS_BASE,
    **{f"{name}-{study}": [replace(run, defense=name) for run in runs]
       for name in ("bedkd", "dup")
       for study, runs in (("sst2-base", SST2_BASE), ("ag-news-base", AG_NEWS_BASE))},
    "cifar10-resnet18": RESNET18,
    "ntml-cifar10-resnet18": [replace(run, defense="ntml") for run in RESNET18],
    # Clean models alone, at `small`: how often does a method act though there is nothing to find?
    "false-alarms": [Run(task, None, 0.0, seed, defense=name) for seed in range(20)
                     for task, name in (("sentiment", "bedkd"), ("sentiment", "dup"),
                                        ("images", "ntml"))],
}
STUDIES |= LARGE  # of these only some are recorded so far
