"""Look for a backdoor in a model of your own: its training file, some clean samples, one report.

What is done is the search of DUP (chapters 7 and 8): the hidden states of training samples are
compared with those of clean samples, label by label. A backdoor shows as one label whose samples
are flagged far more often than its clean ones, and than those of the other labels.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jinja2 import Environment, PackageLoader
from scipy.stats import binom, norm
from sklearn.feature_extraction.text import CountVectorizer
from tqdm import tqdm

from . import __version__
from .data.labels import Raw
from .data.labels import classes as numbered
from .data.tables import read_table
from .defenses.base import Context, hold_out
from .defenses.detector import (
    Detector,
    DetectorConfig,
    Flags,
    SuspectClass,
    detect,
    evidence_by_class,
    fit_detector,
    power,
)
from .defenses.dup import DUP, suspects_of
from .metrics import Rate, cacc, wilson
from .models.adopt import class_names, first_token_is_blind
from .models.text import Classifier
from .plotting import BLACK, BLUE, RED, use_style
from .roles import CleanSet, Examples, TrainSet
from .samples import DataError, in_words

RATES = (0.01, 0.02, 0.05, 0.1, 0.2)  # shares of poisoned samples whose discovery is stated
# What share of the poisoned samples the detector flags, as recorded in chapter 7: inserted words
# and sentences 92% and more, rewritten texts about half.
FLAGGED = {"a word or sentence is inserted": 0.9, "texts are rewritten": 0.5}
LEAST, MOST = 20, 2000  # clean samples: of each class to go on, in all that are used
PHRASES = 5  # shown of each label
CHANCE = 1e-3  # that some phrase of a label is flagged so often, if flags knew no phrases


@dataclass(frozen=True)
class Phrase:
    """A word, or up to four in a row, in the flagged samples of a label."""

    text: str
    """In lower case."""
    flagged: int
    """Flagged samples of the label that hold it."""
    of_label: int
    """All samples of the label that hold it."""
    of_all: int
    """All training samples that hold it."""
    evidence: bool
    """Whether half of its samples or more are flagged and 95% have the label, by no chance."""


@dataclass(frozen=True)
class Finding:
    """What the flags say of one label."""

    name: str
    """Of the class."""
    samples: int
    """Training samples with the label."""
    flagged: Rate
    """Share of them above the threshold."""
    clean: Rate
    """The same of clean samples."""
    excess: float
    """Log odds of a flag less those of clean samples, in standard errors."""
    contrast: float
    """How much more they exceed those of the other labels, in standard errors."""
    suspect: bool
    """Whether this is evidence of a backdoor that leads to the label."""
    phrases: tuple[Phrase, ...]
    """What its flagged samples share; a phrase may be evidence where their number is none."""
    power: Mapping[str, tuple[float, ...]]
    """Kind of trigger -> probability that each of `RATES` would be found."""


@dataclass(frozen=True)
class Audit:
    """What was checked, and what was found."""

    findings: tuple[Finding, ...]
    """One for each label, those with the largest contrast first."""
    accuracy: Rate
    """Of the model on the clean samples."""
    flags: Flags
    """Scores of all training samples."""
    detector: Detector
    """What it learned from the clean samples."""
    seconds: float
    """From the loaded model to here."""

    @property
    def suspects(self) -> tuple[Finding, ...]:
        """The labels to which a backdoor seems to lead."""
        return tuple(finding for finding in self.findings if finding.suspect)

    @property
    def verdict(self) -> str:
        """One sentence for the head of the report."""
        if self.suspects:
            names = in_words([f"“{finding.name}”" for finding in self.suspects])
            return f"Evidence of a backdoor that leads to {names}."
        return "No evidence of a backdoor: see below what would have been found, and what not."


class _WithBar(Sequence):
    """Texts that move a bar when they are read."""

    def __init__(self, texts: Sequence[str], bar: tqdm) -> None:
        self.texts, self.bar = texts, bar

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: Any) -> Any:
        chosen = self.texts[index]
        self.bar.update(len(chosen) if isinstance(index, slice) else 1)
        return chosen


def read_context(model: str | Path, train: str | Path, clean: str | Path, text: str = "text",
                 label: str = "label", names: Sequence[str] | None = None) -> Context:
    """Return what `audit` needs: a finished model and two files of samples.

    Args:
        model: Folder or hub id of any sequence classifier of `transformers`, in safetensors.
        train: The samples that it was trained on, a CSV, TSV, JSON, JSON-lines or parquet file.
        clean: Samples that you can vouch for, in a file of such a kind.
        text, label: Names of the columns.
        names: Of the classes in the order of the model's answers, if it does not name them and the
            files do not number them.

    Raises:
        DataError: For files that do not fit the model, each other, or the needs of the search.
        FileNotFoundError: If something is not there.
        ValueError: If the model is no classifier of texts.
        ConnectionError: If a hub model cannot be loaded.
    """
    raws = [(Path(path).name, read_table(Path(path), (text, label)).raw(text, label))
            for path in (train, clean)]
    classifier = Classifier.load(model)
    known = _names(classifier, raws, names)
    sets = [role(tuple(raw.inputs), _numbers(raw, known, where), known)
            for role, (where, raw) in zip((TrainSet, CleanSet), raws, strict=True)]
    return Context(classifier, _trusted(sets[1], sets[0], Path(clean).name),
                   cast(TrainSet, sets[0]))


def _names(classifier: Classifier, raws: Sequence[tuple[str, Raw]],
           asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the classes, in the order of the model's answers."""
    count = classifier.model.config.num_labels
    known = tuple(asked) if asked else class_names(classifier.model)
    if known is None:
        for where, raw in raws:
            if any(not name.isdecimal() for name in numbered(
                    raw.labels, raw.names, raw.typed, where)[1]):
                raise DataError(f"the model does not name its classes, and the labels of {where} "
                                "are names", "say which answer of the model means which, in its "
                                "order, with names=...", "names")
        known = tuple(map(str, range(count)))
    if len(known) != count:
        raise DataError(f"the model gives {count} classes, not {len(known)} ({in_words(known)})",
                        "use the data that it was trained on", "names")
    return known


def _numbers(raw: Raw, names: tuple[str, ...], where: str) -> tuple[int, ...]:
    """Return the labels of a file as numbers of the model's classes."""
    numbers, own = numbered(raw.labels, raw.names, raw.typed, where)
    if None in numbers:
        raise DataError(f"{where}: sample {numbers.index(None)} has no label",
                        "drop such samples, or label them")
    if all(name.isdecimal() for name in own):
        order = [int(name) for name in own]
    else:
        folded = [name.strip().casefold() for name in names]
        missing = [name for name in own if name.strip().casefold() not in folded]
        if missing:
            raise DataError(f"{where} has the class {missing[0]!r}, and the model knows "
                            f"{in_words(names)}", "rename it, or use the data that the model was "
                            "trained on")
        order = [folded.index(name.strip().casefold()) for name in own]
    if max(order) >= len(names):
        raise DataError(f"{where} has the class {max(order)}, and the model gives {len(names)} "
                        "classes, counted from 0", "use the data that it was trained on")
    return tuple(order[cast(int, number)] for number in numbers)


def _trusted(clean: Examples, train: Examples, where: str) -> CleanSet:
    """Return the clean samples that the model has not seen in training, enough of each class."""
    seen = set(train.inputs)
    new = [i for i, text in enumerate(clean.inputs) if text not in seen]
    if not new:
        raise DataError(f"all samples of {where} are in the training file as well",
                        "give clean samples that the model was not trained on")
    if len(new) < len(clean):
        warnings.warn(f"{len(clean) - len(new)} of {len(clean)} clean samples are in the training "
                      "file as well: they are left out", stacklevel=3)
    kept = cast(CleanSet, clean.take(new))
    for number, name in enumerate(kept.label_names):
        if kept.labels.count(number) < LEAST:
            raise DataError(f"{where} has {kept.labels.count(number)} new samples of the class "
                            f"{name!r}", f"give {LEAST} of each class at least; what more would "
                            "find is in the report")
    return kept if len(kept) <= MOST else kept.stratified(MOST)


def audit(context: Context, config: DUP | None = None, quiet: bool = True) -> Audit:
    """Look for a backdoor.

    Args:
        context: A classifier of texts, its training set and clean samples.
        config: Of DUP, by which the detector is fitted and evidence is weighed.
        quiet: Whether no bar is shown.

    Raises:
        ValueError: Without a training set, for images, or a model whose states do not differ.
    """
    start = time.perf_counter()
    context.require("the audit", train=True)
    if context.train.are_images:
        raise ValueError("the audit follows tokens from layer to layer, and images have none: use "
                         "NT-ML")
    classifier, train, clean = cast(Classifier, context.classifier), context.train, context.clean
    config = config or DUP()
    config = replace(config, detector=_pooled(config.detector, classifier, clean))
    accuracy = cacc(classifier.predict(clean.inputs), clean.labels)
    with tqdm(total=len(train) + len(clean), unit=" texts", disable=quiet) as bar:
        detector = fit_detector(classifier, clean, config.detector)
        bar.update(len(clean))
        flags = detect(classifier, detector, _WithBar(train.inputs, bar), train.labels)
    evidence = evidence_by_class(detector, flags, train.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is none is the verdict here
        suspects = suspects_of(flags, evidence, config)
    labels = torch.cat([torch.tensor(train.labels), detector.labels]).unique().tolist()
    findings = [_finding(label, found, found in suspects, (train, detector, flags), config)
                for label, found in zip(labels, evidence, strict=True)]
    findings.sort(key=lambda finding: -finding.contrast)
    return Audit(tuple(findings), accuracy, flags, detector, time.perf_counter() - start)


def _pooled(config: DetectorConfig, classifier: Classifier, clean: CleanSet) -> DetectorConfig:
    """Read a decoder at its last token, since its first one sees no other."""
    long = max(classifier.encode(clean.inputs[:8]), key=len)
    blind = config.pooling == "cls" and first_token_is_blind(classifier.model, long)
    return replace(config, pooling="last") if blind else config


def _finding(label: int, found: SuspectClass, suspect: bool,
             seen: tuple[TrainSet, Detector, Flags], config: DUP) -> Finding:
    train, detector, flags = seen
    mine = [i for i, y in enumerate(train.labels) if y == label]
    known = detector.labels == label
    above = int((flags.clean[known] > flags.threshold).sum())
    phrases = _phrases(train, label, found.indices, config.min_suspects)
    return Finding(
        train.label_names[label], len(mine), wilson(len(found.indices), len(mine)),
        wilson(above, int(known.sum())), found.excess, found.contrast,
        suspect or any(phrase.evidence for phrase in phrases), phrases,
        _power(len(mine), len(train), known, train.num_labels, config))


def _power(samples: int, n: int, known: torch.Tensor, classes: int, config: DUP
           ) -> dict[str, tuple[float, ...]]:
    """Return how often each share of poisoned samples would be found, see `power`."""
    cuts = float(norm.isf(config.alpha / classes)), config.contrast
    clean = int(known.sum()), int((~known).sum())

    def found(tpr: float, rate: float) -> float:
        planted = round(rate * n)
        rest = max(0, samples - planted)
        if planted > samples or tpr * planted < config.min_suspects:
            return 0.0
        return power(tpr, config.detector.fpr, planted, (rest, n - samples), clean, cuts)

    return {kind: tuple(found(tpr, rate) for rate in RATES) for kind, tpr in FLAGGED.items()}


def _phrases(train: TrainSet, label: int, flagged: Sequence[int], least: int
             ) -> tuple[Phrase, ...]:
    """Return the phrases that the flagged samples of a label share, the most frequent first."""
    counter = CountVectorizer(ngram_range=(1, 4), binary=True, token_pattern=r"\S+", min_df=3,
                              max_features=20_000)  # so that memory does not grow with the samples
    try:
        counter.fit([train.inputs[i] for i in flagged])
    except ValueError:  # no phrase stands in three of them
        return ()
    held = counter.transform(train.inputs)  # (n, phrases), sparse
    chosen, mine = np.zeros(len(train), bool), np.array(train.labels) == label
    chosen[list(flagged)] = True
    caught, of_label, of_all = (np.asarray(held[side].sum(0))[0]
                                for side in (chosen, mine, slice(None)))
    more = caught / max(1, len(flagged)) - (of_all - caught) / max(1, len(train) - len(flagged))
    chance = binom.sf(caught - 1, of_label, len(flagged) / max(1, mine.sum())) * len(of_all)
    evidence = ((of_label >= least) & (caught >= of_label / 2) & (of_label >= 0.95 * of_all)
                & (chance <= CHANCE))
    names = counter.get_feature_names_out()
    best: list[Phrase] = []
    for i in sorted(range(len(names)), key=lambda i: (
            not evidence[i], -more[i], -len(names[i]))):
        if len(best) == PHRASES or not evidence[i] and more[i] < 0.05:
            break
        if not any(f" {names[i]} " in f" {phrase.text} " for phrase in best):
            best.append(Phrase(str(names[i]), int(caught[i]), int(of_label[i]), int(of_all[i]),
                               bool(evidence[i])))
    return tuple(best)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of another one when all is in it."""
    folder = Path(folder).expanduser().absolute()
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: name a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        made = Path(work) / "made"
        made.mkdir()
        yield made
        if folder.exists():
            folder.rename(Path(work) / "before")
        made.rename(folder)


def require_ours(folder: Path) -> None:
    """Reject a folder that holds something else, which would be lost.

    Args:
        folder: For a report or a repaired model.

    Raises:
        FileExistsError: If it does.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "audit.json").is_file():
        raise FileExistsError(f"{folder} holds files that are not of an audit: name another "
                              "folder")


def write_report(found: Audit, context: Context, folder: str | Path, model: str = "") -> Path:
    """Write `index.html`, which needs no other file, `flagged.csv` and `audit.json`.

    Args:
        found: By `audit`.
        context: That was audited.
        folder: To be made; a report that is there is replaced when the new one is complete.
        model: Its name, for the report's head.

    Returns:
        Path of the page.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    require_ours(Path(folder))
    flagged = _flagged(found, context.train)
    page = Environment(loader=PackageLoader("bdutils", "templates"), autoescape=True).get_template(
        "audit.html.j2")
    use_style()
    with _whole(Path(folder)) as made:
        made.joinpath("index.html").write_text(page.render(
            audit=found, context=context, model=model, version=__version__, rates=RATES,
            lowest=lambda kind, i: min(finding.power[kind][i] for finding in found.findings),
            flagged=flagged.head(200).to_dict("records"), count=len(flagged),
            scores=_score_figure(found, context.train), curve=_power_figure(found)),
            encoding="utf8")
        flagged.to_csv(made / "flagged.csv", index=False)
        made.joinpath("audit.json").write_text(json.dumps(_record(found, context), indent=1),
                                               encoding="utf8")
    return Path(folder) / "index.html"


def _flagged(found: Audit, train: TrainSet) -> pd.DataFrame:
    """Return the flagged samples, those of suspect labels and high scores first."""
    suspect = {finding.name for finding in found.suspects}
    table = pd.DataFrame([{
        "sample": i, "label": train.label_names[train.labels[i]],
        "suspect": train.label_names[train.labels[i]] in suspect,
        "score": round(float(found.flags.scores[i]), 3), "text": train.inputs[i]}
        for i in found.flags.indices], columns=["sample", "label", "suspect", "score", "text"])
    return table.sort_values(["suspect", "score"], ascending=False)


def _record(found: Audit, context: Context) -> dict[str, Any]:
    return {"verdict": found.verdict, "bdutils": __version__,
            "training samples": len(context.train), "clean samples": len(context.clean),
            "accuracy": asdict(found.accuracy), "flagged": len(found.flags.indices),
            "rates": RATES, "findings": [asdict(finding) for finding in found.findings],
            "seconds": round(found.seconds, 1)}


def _svg(figure: Any) -> str:
    """Return a figure as an address that holds it."""
    import matplotlib.pyplot as plt

    file = io.BytesIO()
    figure.savefig(file, format="svg")
    plt.close(figure)
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _score_figure(found: Audit, train: TrainSet) -> str:
    """Draw how the scores of training samples and of clean ones are distributed, by label."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    shown = found.findings[:4]
    figure, axes = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 2.8), sharey=True,
                                squeeze=False)
    given = torch.tensor(train.labels)
    for ax, finding in zip(axes[0], shown, strict=True):
        label = train.label_names.index(finding.name)
        for scores, color, name in ((found.flags.clean[found.detector.labels == label], BLUE,
                                     "clean"),
                                    (found.flags.scores[given == label], RED, "training")):
            if len(scores):
                sns.ecdfplot(x=scores.tolist(), complementary=True, color=color, label=name, ax=ax)
        ax.axvline(found.flags.threshold, color=BLACK, linestyle=":", linewidth=1)
        ax.set(title=finding.name, xlabel="score", ylabel="share above")
    axes[0][0].legend()
    return _svg(figure)


def _power_figure(found: Audit) -> str:
    """Draw the probability of discovery against the share of poisoned samples."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    table = pd.DataFrame([
        {"poisoned samples": 100 * rate, "probability": p, "trigger": kind}
        for finding in found.findings for kind, values in finding.power.items()
        for rate, p in zip(RATES, values, strict=True)])
    figure, ax = plt.subplots(figsize=(5.2, 2.8))
    sns.lineplot(table, x="poisoned samples", y="probability", hue="trigger", style="trigger",
                 markers=True, estimator="min", errorbar=None, ax=ax)
    ax.set(xscale="log", xticks=[100 * r for r in RATES], ylim=(-0.03, 1.03),
           xticklabels=[f"{r:.0%}" for r in RATES], ylabel="probability to be found")
    ax.minorticks_off()
    ax.legend(title=None)
    return _svg(figure)


def repair(context: Context, config: DUP | None = None, held: float = 0.25
           ) -> tuple[Classifier, dict[str, Any]]:
    """Unlearn a backdoor if there is evidence of one, and measure on clean samples kept apart.

    Args:
        context: As for `audit`.
        config: Of DUP.
        held: Share of the clean samples that the repair does not see.

    Returns:
        The repaired model, or a copy of the given one; and what a model card should say.

    Raises:
        ValueError: As for `audit`.
    """
    rest, measured = hold_out(context.clean, held, seed=0)
    config = config or DUP()
    classifier = cast(Classifier, context.classifier)
    config = replace(config, detector=_pooled(config.detector, classifier, rest))
    before = cacc(classifier.predict(measured.inputs), measured.labels)
    outcome = config(replace(context, clean=rest))
    model = cast(Classifier, outcome.model)
    if class_names(model.model) is None:
        model.model.config.id2label = dict(enumerate(rest.label_names))
        model.model.config.label2id = {name: i for i, name in enumerate(rest.label_names)}
    after = cacc(model.predict(measured.inputs), measured.labels)
    suspects = [i for c in outcome.report["suspects"] for i in c.indices]
    kept = sum(y == context.train.labels[i] for i, y in zip(
        suspects, model.predict([context.train.inputs[i] for i in suspects]), strict=True)
        ) if suspects else 0
    return model, {
        "verdict": outcome.verdict, "before": before, "after": after, "suspects": len(suspects),
        "agreement": wilson(kept, len(suspects)) if suspects else None}


def write_model(model: Classifier, about: Mapping[str, Any], folder: str | Path,
                source: str = "") -> Path:
    """Write a model that plain `transformers` opens, with a model card.

    Args:
        model: By `repair`.
        about: By `repair`.
        folder: To be made, or one that this wrote before.
        source: Name of the model that was repaired.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    require_ours(Path(folder))
    card = Environment(loader=PackageLoader("bdutils", "templates")).get_template("card.md.j2")
    with _whole(Path(folder)) as made:
        model.save(made)
        if Path(folder, "report").is_dir():  # it stays until there is a new one
            shutil.copytree(Path(folder, "report"), made / "report")
        made.joinpath("README.md").write_text(
            card.render(about=about, source=source, version=__version__), encoding="utf8")
        made.joinpath("audit.json").write_text(json.dumps(
            {key: asdict(value) if isinstance(value, Rate) else value
             for key, value in about.items()}, indent=1), encoding="utf8")
    return Path(folder)
