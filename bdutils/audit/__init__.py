"""Look for a backdoor in a model of your own: its training data, some clean samples, one report.

Texts and images go the same way; what differs is in `texts` and `images`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from jinja2 import Environment, PackageLoader

from .. import __version__
from ..data.deal import sample_key
from ..data.image import read_folder
from ..data.labels import Raw
from ..data.labels import classes as numbered
from ..data.tables import read_table
from ..defenses.base import Context, hold_out
from ..defenses.dup import DUP
from ..defenses.ntml import NTML
from ..metrics import Rate, cacc
from ..models.adopt import class_names
from ..models.image import ImageClassifier
from ..models.text import Classifier
from ..plotting import use_style
from ..roles import CleanSet, Examples, Images, TrainSet
from ..samples import DataError, in_words
from ..training import ImageTrainConfig, Model, Training
from . import images, texts
from .base import Audit, Finding

__all__ = ["Audit", "Finding", "audit", "read_context", "repair", "require_ours", "write_model",
           "write_report"]
MOST = 2000  # clean samples that are used
CARD = "README.md"  # of a repaired model


def _side(samples: Examples) -> ModuleType:
    """Return the module that looks at such samples."""
    return images if samples.are_images else texts


def read_context(model: str | Path | Model, train: str | Path, clean: str | Path,
                 text: str = "text", label: str = "label", names: Sequence[str] | None = None,
                 epochs: int | None = None, base: str | Path | None = None) -> Context:
    """Return what `audit` needs: a finished model, and its training set beside clean samples.

    Args:
        model: Folder or hub id of any sequence classifier of `transformers`, in safetensors; of an
            adapter of one, by PEFT; or a folder that `ImageClassifier.save` wrote. Or a classifier
            that is loaded already, such as an `ImageClassifier` around a network of your own.
        train: The samples that it was trained on, a CSV, TSV, JSON, JSON-lines or parquet file;
            for images a folder that holds a folder of each class.
        clean: Samples that you can vouch for, in the same form.
        text, label: Names of the columns.
        names: Of the classes in the order of the model's answers, if it does not name them and the
            data do not number them; those of folders are else taken in their order.
        epochs: In which a model of images was trained, as usual if None.
        base: Of an adapter, if not the model that its configuration names.

    Raises:
        DataError: For data that do not fit the model, each other, or the needs of the search.
        FileNotFoundError: If something is not there.
        ValueError: If the model is no classifier of texts or images.
        ConnectionError: If a hub model cannot be loaded.
    """
    training = cast(Training, None)
    train, clean = Path(train).expanduser(), Path(clean).expanduser()
    if isinstance(model, str | Path) and (Path(model).expanduser() / "network.json").is_file():
        model = ImageClassifier.load(model)
    if isinstance(model, ImageClassifier):
        usual = ImageTrainConfig.at(pad=model.pad, flip=model.flip)
        training = replace(usual, epochs=usual.epochs if epochs is None else epochs)
        raws = _folders((train, clean), model.model.config.channels)
    else:
        raws = [(Path(path).name, read_table(Path(path), (text, label)).raw(text, label))
                for path in (train, clean)]
    classifier = Classifier.load(model, base=base) if isinstance(model, str | Path) else model
    known = _names(classifier, raws, names)
    sets = [role(cast(Images, raw.inputs), _numbers(raw, known, where), known)
            for role, (where, raw) in zip((TrainSet, CleanSet), raws, strict=True)]
    return Context(classifier, _trusted(sets[1], sets[0], Path(clean).name),
                   cast(TrainSet, sets[0]), training)


def _folders(paths: Sequence[str | Path], channels: int) -> list[tuple[str, Raw]]:
    """Return the images of folders, all of the first one's size, with a model's channels."""
    raws: list[tuple[str, Raw]] = []
    size = None
    for path in map(Path, paths):
        if not path.is_dir():
            raise DataError(f"{path} is no folder, and the model reads images",
                            "give a folder that holds a folder of images for each class")
        raw = read_folder(path, size)
        for note in raw.notes:
            warnings.warn(f"{path.name}: {note}", stacklevel=3)
        pixels = cast(Images, raw.inputs).pixels
        if pixels.shape[1] > channels:
            raise DataError(f"{path} holds images with colors, and the model reads gray ones",
                            "save them as the model was trained on them")
        size = (pixels.shape[2], pixels.shape[3])
        raws.append((path.name, replace(raw, inputs=Images(
            pixels.expand(-1, channels, -1, -1).contiguous()))))
    return raws


def _names(classifier: Model, raws: Sequence[tuple[str, Raw]],
           asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the classes, in the order of the model's answers."""
    count = classifier.model.config.num_labels
    known = tuple(asked) if asked else class_names(classifier.model)
    if known is None:
        for where, raw in raws:
            own = numbered(raw.labels, raw.names, raw.typed, where)[1]
            if all(name.isdecimal() for name in own):
                continue
            if isinstance(classifier, ImageClassifier):  # trained on such folders, in their order
                known = own
                break
            raise DataError(f"the model does not name its classes, and the labels of {where} "
                            "are names", "say which answer of the model means which, in its "
                            "order, with names=...", "names")
    known = known or tuple(map(str, range(count)))
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
    seen = set(map(sample_key, train.inputs))
    new = [i for i, sample in enumerate(clean.inputs) if sample_key(sample) not in seen]
    if not new:
        raise DataError(f"all samples of {where} are in the training set as well",
                        "give clean samples that the model was not trained on")
    if len(new) < len(clean):
        warnings.warn(f"{len(clean) - len(new)} of {len(clean)} clean samples are in the training "
                      "set as well: they are left out", stacklevel=3)
    kept, least = cast(CleanSet, clean.take(new)), _side(clean).LEAST
    for number, name in enumerate(kept.label_names):
        if kept.labels.count(number) < least:
            raise DataError(f"{where} has {kept.labels.count(number)} new samples of the class "
                            f"{name!r}", f"give {least} of each class at least; what more would "
                            "find is in the report")
    return kept if len(kept) <= MOST else kept.stratified(MOST)


def audit(context: Context, config: DUP | NTML | None = None, quiet: bool = True) -> Audit:
    """Look for a backdoor.

    Args:
        context: A classifier, its training set and clean samples; of images also how it was
            trained.
        config: Of DUP for texts, of NT-ML for images.
        quiet: Whether no bar is shown.

    Raises:
        ValueError: Without a training set, for images without their training or of two classes, or
            for a model of texts whose states do not differ.
    """
    side = _side(context.clean)
    found: Audit = side.search(context, side.prepared(context, config), quiet)
    most = max(map(context.clean.labels.count, set(context.clean.labels))) / len(context.clean)
    if found.accuracy.high < most:
        warnings.warn(f"the model is right in {found.accuracy.value:.0%} of clean samples: are "
                      "the names of the classes in the order of its answers?", stacklevel=2)
    return found


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes the place of another one when all is in it."""
    folder = folder.absolute()
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file: name a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
        made = Path(work) / "made"
        made.mkdir()
        yield made
        before = Path(work) / "before"
        if folder.exists():
            folder.rename(before)
        try:
            made.rename(folder)
        except BaseException:
            if before.exists():
                before.rename(folder)
            raise


def require_ours(folder: Path, for_model: bool) -> None:
    """Reject a folder that holds something else, which would be lost.

    Args:
        folder: For a report or a repaired model.
        for_model: Which of them.

    Raises:
        FileExistsError: If it holds a file that no audit wrote, or a repaired model where a report
            is to be.
    """
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        ours = json.loads((folder / "audit.json").read_text("utf8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or not one of ours
        ours = []
    if others := sorted(there.difference(ours if isinstance(ours, list) else ())):
        raise FileExistsError(f"{folder} holds {others[0]}, which is not of an audit: name "
                              "another folder")
    if CARD in there and not for_model:
        raise FileExistsError(f"{folder} holds a repaired model: name another folder for the "
                              "report")


def _sign(folder: Path, about: Mapping[str, Any], *later: str) -> None:
    """Write down what was found, and which files are ours."""
    files = sorted({"audit.json", *later, *(path.name for path in folder.iterdir())})
    folder.joinpath("audit.json").write_text(json.dumps({**about, "files": files}, indent=1),
                                             encoding="utf8")


def write_report(found: Audit, context: Context, folder: str | Path, model: str = "",
                 files: Sequence[str] = ()) -> Path:
    """Write `index.html`, which needs no other file, `flagged.csv` and `audit.json`.

    Args:
        found: By `audit`.
        context: That was audited.
        folder: To be made; a report that is there is replaced when the new one is complete.
        model: Its name, for the report's head.
        files: Where the training images lie, in their order, to be named in `flagged.csv`.

    Returns:
        Path of the page.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    folder = Path(folder).expanduser()
    require_ours(folder, for_model=False)
    flagged = found.flagged(context.train)
    if files:
        flagged.insert(1, "file", [files[i] for i in flagged["sample"]])
    page = Environment(loader=PackageLoader("bdutils", "templates"), autoescape=True).get_template(
        found.template)
    use_style()
    with _whole(folder) as made:
        made.joinpath("index.html").write_text(page.render(
            audit=found, context=context, model=model, version=__version__,
            flagged=flagged.head(200).to_dict("records"), count=len(flagged),
            **found.shown(context)), encoding="utf8")
        flagged.to_csv(made / "flagged.csv", index=False)
        _sign(made, _record(found, context))
    return folder / "index.html"


def _record(found: Audit, context: Context) -> dict[str, Any]:
    return {"bdutils": __version__, "training samples": len(context.train),
            "clean samples": len(context.clean), **found.record()}


def repair(context: Context, config: DUP | NTML | None = None, held: float = 0.25
           ) -> tuple[Model, dict[str, Any]]:
    """Remove a backdoor if there is evidence of one; measure on clean samples kept apart.

    Args:
        context: As for `audit`.
        config: Of DUP for texts, of NT-ML for images.
        held: Share of the clean samples that the repair does not see.

    Returns:
        The repaired model, or a copy of the given one; and what a model card should say.

    Raises:
        ValueError: As for `audit`.
    """
    side, (rest, measured) = _side(context.clean), hold_out(context.clean, held, seed=0)
    context = replace(context, clean=rest)
    before = cacc(context.classifier.predict(measured.inputs), measured.labels)
    outcome = side.repair(context, side.prepared(context, config))
    model, suspects = side.repaired(outcome, rest.label_names)
    after, those = cacc(model.predict(measured.inputs), measured.labels), None
    if suspects:
        chosen = context.train.take(suspects)
        those = cacc(model.predict(chosen.inputs), chosen.labels)
    return model, {"verdict": outcome.verdict, "method": side.METHOD, "opened": side.OPENED,
                   "before": before, "after": after, "suspects": len(suspects),
                   "agreement": those}


def write_model(model: Model, about: Mapping[str, Any], folder: str | Path,
                source: str = "") -> Path:
    """Write a model that `transformers` or, for images, `ImageClassifier` opens, with a card.

    Args:
        model: By `repair`.
        about: By `repair`.
        folder: To be made, or one that this wrote before.
        source: Name of the model that was repaired.

    Raises:
        FileExistsError: If the folder holds something else.
    """
    folder = Path(folder).expanduser()
    require_ours(folder, for_model=True)
    card = Environment(loader=PackageLoader("bdutils", "templates")).get_template("card.md.j2")
    with _whole(folder) as made:
        model.save(made)
        if folder.joinpath("report").is_dir():  # it stays until there is a new one
            shutil.copytree(folder / "report", made / "report")
        made.joinpath(CARD).write_text(
            card.render(about=about, source=source, version=__version__), encoding="utf8")
        _sign(made, {key: asdict(value) if isinstance(value, Rate) else value
                     for key, value in about.items()}, "report")
    return folder
