"""The recorded runs of all defenses side by side: what was measured, and which orders hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..metrics import der
from ..plotting import SortableTable
from . import results

# Keys in the records, and what tables and figures show.
NAMES = {"ft": "fine-tuning", "fp": "fine-pruning", "nad": "NAD", "ft_sam": "FT-SAM",
         "ibau": "I-BAU", "strip": "STRIP", "onion": "ONION", "bedkd": "BeDKD", "dup": "DUP",
         "ntml": "NT-ML", "spectral": "Spectral Signatures", "ac": "Activation Clustering",
         "abl": "ABL", "cube": "CUBE", "clp": "CLP", "ft_sweep": "fine-tuning (chosen rate)"}
# Where a name alone does not say whose settings or code it is.
WHOSE = {"bedkd": "BeDKD (ours)", "bedkd-authors": "BeDKD (authors')", "dup": "DUP (ours)",
         "dup-authors": "DUP (authors' settings)", "dup-retraining": "DUP's flags, retrained",
         "ntml": "NT-ML (reconstruction)"}
ATTACKS = {"badnets": "BadNets", "addsent": "AddSent", "synbkd": "SynBkd", "stylebkd": "StyleBkd",
           "blended": "Blended", "sig": "SIG", "wanet": "WaNet", "input_aware": "Input-Aware",
           "label_consistent": "LC"}
TRAINING, WEIGHTS, ANSWERS = HOLDS = "training set", "weights", "answers"
_ANSWERS, _TRAINING = ("strip", "onion"), ("bedkd", "dup", "ntml", "spectral", "ac", "abl", "cube")
NEEDS = {name: ANSWERS if key in _ANSWERS else
         TRAINING if key.split("-")[0] in _TRAINING else WEIGHTS
         for key, name in (NAMES | WHOSE).items()}

# Three seeds of every cell, and what was run once.
STUDIES = ("bedkd", "dup", "baselines-text", "ntml", "baselines", "filters", "bedkd-images",
           "low-rate", "bedkd-rates", "dup-rates", "ntml-rates")
# As well; the first page leaves them out.
OLDER = ("baselines-train", "baselines-train-text", "dup-retraining")
ONCE = ("bedkd-authors", "dup-deviations", "sweep-text")
KINDS = {"snippets": "text", "fashion": "image"}
USUAL = {"text": ("badnets", "addsent", "synbkd", "stylebkd"),
         "image": ("badnets", "blended", "sig", "wanet", "input_aware", "label_consistent")}
USUAL_RATES = {"text": (0.2,), "image": (0.1, 0.08)}
RARE = {"text": "addsent", "image": "sig"}  # at 1%; both still work
# Settings were chosen on seed 0; chapter 13 names what else was seen.
LATER = 1, 2
ABSENT = {
    ("text", "fine-pruning"): "prunes the channels of a network for images",
    ("text", "NAD"): "compares maps of a network for images",
    ("text", "I-BAU"): "adds numbers to pixels; words are not numbers",
    ("text", "NT-ML (reconstruction)"): "two classes: its first loss has no gradient",
    ("image", "ONION"): "removes words; images have none",
    ("image", "DUP (ours)"): "adapts the attention of a transformer",
}
# Of these four an order has to hold on all. Less is better but for RA and DER.
ORDERS = {"distance": -1, "gap": -1, "ra": 1, "der": 1}
MEASURES = {"distance": "distance from the floor", "gap": "PACC gap", "ra": "RA",
            "lost": "CACC lost", "der": "DER"}


def distance(asr: float, floor: float) -> float:
    """Return how far an ASR is from its floor, counted from both sides.

    An ASR below the floor is an error too: triggered samples are pushed to another answer.

    Args:
        asr: Of the defended model.
        floor: ASR of a clean model on the same samples, in the same unit.
    """
    return abs(asr - floor)


def measures(run: dict) -> dict[str, float]:
    """Return what the comparison needs of a record, in percent and points.

    Args:
        run: A record of a defense.

    Returns:
        `lost` for every model; with a trigger also `before`, `asr`, `floor`, `distance`, `ra`,
        `gap` (PACC of a clean model minus PACC) and `der`, which earns nothing below the floor.

    Source: the measures of chapter 2; DER of Zhu et al. 2023, clipped by us.
    """
    of = {name: results.value(run, name) for name in run["metrics"]}
    found = {"lost": of["cacc_before"] - of["cacc"]}
    if "asr" in of:
        found |= {"before": of["asr_before"], "asr": of["asr"], "floor": of["floor"],
                  "distance": distance(of["asr"], of["floor"]), "ra": of["ra"],
                  "gap": of["clean_pacc"] - of["pacc"],
                  "der": der(of["cacc_before"], of["cacc"], of["asr_before"],
                             max(of["asr"], of["floor"]))}
    return {name: 100 * value for name, value in found.items()}


def entry_of(run: dict) -> dict | None:
    """Return a record as an entry of the comparison, None if it does not belong there.

    Args:
        run: A record; left out are other data, other variants, and attacks that put no backdoor
            into the model.
    """
    key = run["settings"].get("defense", "").removesuffix("-text").removesuffix("-images")
    name, kind, attack = WHOSE.get(key, NAMES.get(key)), KINDS.get(run["task"]), run["method"]
    known = attack == "clean" or attack in ATTACKS and results.is_backdoor(run)
    if not name or not kind or not known:
        return None
    return {"kind": kind, "defense": name, "attack": attack, "seed": run["seed"],
            "rate": run["settings"]["poison_rate"], "holds": NEEDS[name],
            "seconds": sum(run["seconds"].values()), **measures(run), "run": run}


def collect(studies: Sequence[str] = STUDIES, folder: Path | None = None) -> pd.DataFrame:
    """Return one line for each recorded run.

    Args:
        studies: Their names.
        folder: Of the records.

    Raises:
        ValueError: If a cell has a seed twice.
    """
    found = [entry_of(run) for study in studies for run in results.load(study, folder)]
    frame = pd.DataFrame([entry for entry in found if entry])
    twice = frame.duplicated(["kind", "defense", "attack", "seed", "rate"])
    if twice.any():
        raise ValueError(f"recorded twice: {[run['name'] for run in frame['run'][twice]]}")
    return frame


def usual(frame: pd.DataFrame, kind: str, seeds: Iterable[int] = (0, 1, 2)) -> pd.DataFrame:
    """Return the runs with the usual attacks at the usual poison rate.

    Args:
        frame: From `collect`.
        kind: `text` or `image`.
        seeds: Which of them.
    """
    return frame[frame["kind"].eq(kind) & frame["attack"].isin(USUAL[kind])
                 & frame["rate"].isin(USUAL_RATES[kind]) & frame["seed"].isin(list(seeds))]


def compared(frame: pd.DataFrame, kind: str, seeds: Sequence[int] = LATER) -> pd.DataFrame:
    """Return the runs of the defenses that have every attack and seed.

    Args:
        frame: From `collect`.
        kind: Of input.
        seeds: That they must have.

    Raises:
        ValueError: If no defense has all.
    """
    runs = usual(frame, kind, seeds)
    whole = runs.groupby("defense")["seed"].transform("size") == len(USUAL[kind]) * len(seeds)
    if not whole.any():
        raise ValueError(f"no defense has all attacks of {kind} on seeds {tuple(seeds)}")
    return runs[whole]


def resampled(frame: pd.DataFrame, kind: str, measure: str = "distance",
              seeds: Sequence[int] = LATER, times: int = 4000) -> pd.DataFrame:
    """Return the mean of each defense in many resampled grids.

    Attacks are drawn for all defenses together. Seeds are drawn together for those that met the
    very same models, and apart for those whose models were trained anew.

    Args:
        frame: As for `compared`.
        kind: Of input.
        measure: One of `MEASURES`.
        seeds: To draw from.
        times: How many draws.

    Returns:
        A line for each draw, a column for each defense.

    Source: Efron 1979.
    """
    runs = compared(frame, kind, seeds).sort_values(["attack", "seed"])
    attacks, rng = len(USUAL[kind]), np.random.default_rng(0)
    attack = rng.integers(attacks, size=(times, attacks, 1))
    draws: dict[tuple, np.ndarray] = {}
    found = {}
    for name, own in runs.groupby("defense"):
        models = tuple(results.value(run, "cacc_before") for run in own["run"])
        if models not in draws:
            draws[models] = rng.integers(len(seeds), size=(times, attacks, len(seeds)))
        values = own[measure].to_numpy().reshape(attacks, len(seeds))
        found[name] = values[attack, draws[models]].mean((1, 2))
    return pd.DataFrame(found)


def ahead(frame: pd.DataFrame, kind: str, one: str, other: str,
          seeds: Sequence[int] = LATER) -> dict[str, float]:
    """Return in which share of the draws one defense is better, by each of `ORDERS`.

    Args:
        frame: As for `compared`.
        kind: Of input.
        one, other: Two defenses.
        seeds: To draw from.
    """
    drawn = {name: resampled(frame, kind, name, seeds) for name in ORDERS}
    return {name: float((sign * drawn[name][one] > sign * drawn[name][other]).mean())
            for name, sign in ORDERS.items()}


def summary(frame: pd.DataFrame, kind: str, seeds: Sequence[int] = LATER) -> pd.DataFrame:
    """Return means over attacks and seeds, nearest to the floor first.

    Args:
        frame: As for `compared`.
        kind: Of input.
        seeds: Which of them.

    Returns:
        A line for each defense: the measures, `low` and `high` of the distance (95% of the
        resampled grids), `worst` and `worst_on` (ASR less floor of the run farthest from its
        floor, of all seeds, and the run) and `clean` (CACC lost by clean models).
    """
    runs = compared(frame, kind, seeds)
    table = runs.groupby("defense")[["asr", "floor", "ra", *MEASURES]].mean()
    table = table.loc[:, ~table.columns.duplicated()]
    drawn = resampled(frame, kind, "distance", seeds)
    table["low"], table["high"] = drawn.quantile(.025), drawn.quantile(.975)
    every = usual(frame, kind)
    worst = every.loc[every.groupby("defense")["distance"].idxmax()].set_index("defense")
    table["worst"], table["holds"] = worst["asr"] - worst["floor"], worst["holds"]
    table["worst_on"] = worst["attack"].map(ATTACKS) + ", seed " + worst["seed"].astype(str)
    clean = frame[frame["kind"].eq(kind) & frame["attack"].eq("clean")
                  & frame["seed"].isin(seeds)]
    table["clean"] = clean.groupby("defense")["lost"].mean()
    return table.sort_values("distance")


def leaderboard(frame: pd.DataFrame) -> SortableTable:
    """Return every recorded cell, in percent and points, nearest to its floor first.

    Args:
        frame: From `collect`.
    """
    keys = ["kind", "defense", "attack", "rate", "holds"]
    columns = ["distance", "asr", "floor", "ra", "gap", "lost"]
    cells = frame.groupby(keys)[columns].mean().join(
        frame.groupby(keys)["seed"].nunique().rename("seeds")).reset_index()
    cells = cells.sort_values("distance", na_position="last", kind="stable")
    order = cells[["defense", "attack", *columns, "kind", "holds", "rate", "seeds"]].copy()
    shown = order.copy()
    shown["attack"] = shown["attack"].map(ATTACKS).fillna("none: clean model")
    shown["rate"] = shown["rate"].map("{:.0%}".format).replace("0%", "none")
    for name in columns:
        shown[name] = (shown[name].round(1) + 0).map("{:.1f}".format).replace("nan", "–")
        # What is not there comes last when the smallest is first.
        order[name] = order[name].fillna(999.0)
    heads = ["Defense", "Attack", "Distance", "ASR", "Floor", "RA", "PACC gap", "CACC lost",
             "Data", "Holds", "Poison", "Seeds"]
    shown.columns = order.columns = pd.Index(heads)
    return SortableTable(shown, order, "Every recorded cell. Means over its seeds, in percent "
                         "and points; nearest to the floor first.", ("Data", "Holds", "Poison"))
