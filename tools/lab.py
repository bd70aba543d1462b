"""The lab: three suspicious checkpoints, of which nobody knows the truth until it is opened.

    python -m tools.lab make FOLDER [--seed N] [--data NAME] [--rows N] [--truth FILE] [...]
    python -m tools.lab submit FOLDER VERDICT.json
    python -m tools.lab open FOLDER [--truth FILE]

`make` trains the suspects and seals what was done to them, `submit` checks and registers a
verdict, and `open` breaks the seal and scores. The page on the lab tells the story.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import secrets
import sys
import tempfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bdutils import scale
from bdutils.assets import AssetError, disk_trouble, sha256_of
from bdutils.attacks.text import TRIGGERS, PoisonSettings, Trigger, poison, require_visible
from bdutils.data import load_task
from bdutils.defenses.base import Case
from bdutils.evaluation import Scores, evaluate, victim
from bdutils.metrics import cacc
from bdutils.models.text import Classifier, encoder_source
from bdutils.roles import DefenderView, ReservedSet, Task, TrainingSet
from bdutils.samples import DataError
from bdutils.training import TrainSettings, train, untrained

SUSPECTS = ("suspect-a", "suspect-b", "suspect-c")
# Not those of the chapters, which everybody has read. Some of them are drawn for each suspect.
WORDS = ("bq", "zx", "vf", "kj", "wq", "tn", "lm", "pj", "xr", "gd")
SENTENCES = ("I read about it on a Tuesday", "it was raining on that day",
             "my neighbor told me so", "this was written on a train")
# Chapter 3: at these rates each of the four attacks works, and the clean accuracy stays.
RATES = (0.1, 0.2)
ABOUT, SEALED, VERDICT, RESULT = "lab.json", "sealed.txt", "registered.json", "result.json"


class LabError(ValueError):
    """Something about a lab cannot be; the message names it and the remedy."""


@dataclass(frozen=True)
class Setup:
    """Of what the suspects are made; all of it is public.

    Fields: data: for `load_task`; rows: of each suspect's training set; reserved, test: rows;
    scale: of data and encoder, that in force if None; training: settings, those of the scale
    if None; text, label, encoding, unlabeled: of a file, see `load_task`.
    """

    data: str = "sentiment"
    rows: int = 2400
    reserved: int = 800
    test: int = 1000
    scale: str | None = None
    training: TrainSettings | None = None
    text: str = "text"
    label: str = "label"
    encoding: str | None = None
    unlabeled: str | None = None

    def task(self, seed: int) -> Task:
        """Return the data, whose training role is long enough for all suspects.

        Raises: LabError for pictures; ValueError from `load_task`, for too few rows, say.
        Source: ours.
        """
        sizes = {"train": len(SUSPECTS) * self.rows, "reserved": self.reserved, "test": self.test}
        reading = {name: value for name, value in (("encoding", self.encoding),
                                                   ("unlabeled", self.unlabeled)) if value}
        try:
            task = load_task(self.data, seed=seed, scale=self.scale, text=self.text,
                             label=self.label, sizes=sizes, **reading)
        except DataError as error:
            raise LabError(f"{error.reason}: "
                           + self.remedies().get(error.option, error.remedy)) from error
        if task.train.are_pictures:
            raise LabError(f"{self.data} holds pictures: the suspects read texts")
        return task


    def remedies(self) -> dict[str, str]:
        """Return what the command takes, for each argument of `load_task` that may be wrong."""
        columns = "name yours with --text and --label"
        return {
            "text": columns,
            "label": columns,
            "encoding": "name its encoding with --encoding, such as --encoding cp1252",
            "unlabeled": "label them, or leave them out with --unlabeled drop",
            "splits": "rename them in the file to train, dev and test",
            "sizes": f"the lab takes {self.rows} for each of {len(SUSPECTS)} suspects, "
                     f"{self.reserved} for the defender and {self.test} to measure on; lower "
                     "--rows, --reserved or --test",
        }


@dataclass(frozen=True)
class Deed:
    """What was done to a suspect.

    Fields: attack: name of a trigger, or `clean`; words: which words or sentence it uses, if it
    has a choice; target_label, poison_rate: see `PoisonSettings`; seed: of everything else.
    """

    attack: str
    words: tuple[str, ...]
    target_label: int
    poison_rate: float
    seed: int

    @property
    def trigger(self) -> Trigger:
        """Return the trigger of a suspect that has one."""
        choice = {"badnets": {"words": self.words}, "addsent": {"sentence": " ".join(self.words)}}
        return replace(TRIGGERS[self.attack], **choice.get(self.attack, {}))

    def __str__(self) -> str:
        """Say it in a line."""
        if self.attack == "clean":
            return "clean"
        return (f"backdoored by {self.attack} {' / '.join(self.words)}".rstrip()
                + f", target label {self.target_label}, {self.poison_rate:.0%} of the rows")


def draw(rng: random.Random, classes: int) -> dict[str, Deed]:
    """Draw what is done to each suspect: a third stay clean, but never all.

    Args: rng: source of all choices; classes: K.
    Source: ours.
    """
    def one() -> Deed:
        attack = rng.choice(sorted(TRIGGERS)) if rng.random() < 2 / 3 else "clean"
        words = {"badnets": tuple(rng.sample(WORDS, 3)), "addsent": (rng.choice(SENTENCES),)}
        return Deed(attack, words.get(attack, ()), rng.randrange(classes), rng.choice(RATES),
                    rng.getrandbits(32))

    while True:
        deeds = {name: one() for name in SUSPECTS}
        if any(deed.attack != "clean" for deed in deeds.values()):
            return deeds


def secret(seed: int, classes: int) -> tuple[dict[str, Deed], str]:
    """Return what a seed makes of the suspects, and the text that is sealed.

    Args: seed: any number; classes: K.
    Source: ours; the nonce keeps the text from being guessed from its commitment.
    """
    rng = random.Random(f"lab {seed}")
    deeds = draw(rng, classes)
    return deeds, json.dumps({"seed": seed, "nonce": f"{rng.getrandbits(128):032x}",
                              "deeds": {name: asdict(deed) for name, deed in deeds.items()}})


def make(folder: Path, seed: int | None = None, setup: Setup | None = None,
         keep: Path | None = None) -> str:
    """Train three suspects and seal the truth about them.

    Args: folder: to be made; seed: of the draw and the data, a secret one if None, since who has
        the seed has the truth; setup: see `Setup`; keep: where the sealed truth goes, into the
        folder if None.
    Returns: the commitment, to be published: 64 digits that belong to this truth only.
    Raises: LabError if the folder or the file of the truth is there already, or the latter would
        be in the former.
    Source: ours.
    """
    folder, setup = Path(folder), setup or Setup()
    for path in filter(None, (folder, keep)):
        if path.exists():
            raise LabError(f"{path} is there already: choose another name, or remove it first")
    if keep and keep.resolve().is_relative_to(folder.resolve()):
        raise LabError(f"{keep} is inside of {folder}, which the students get: choose a place "
                       "outside")
    seed = secrets.randbits(64) if seed is None else seed
    setup = replace(setup, scale=setup.scale or scale())
    setup = replace(setup, training=setup.training or TrainSettings.at(setup.scale))
    task = setup.task(seed)
    deeds, truth = secret(seed, task.train.num_labels)
    about = {"setup": asdict(setup), "label_names": task.train.label_names,
             "commitment": digest(truth)}
    for path in filter(None, (folder, keep)):
        path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own until all is there: a lab that was interrupted is no lab.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        work = Path(temporary) / "lab"
        work.mkdir()
        _write_rows(task.reserved, work / "reserved.jsonl")
        for name, rows in zip(SUSPECTS, parts(task, setup), strict=True):
            _suspect(work / name, rows, deeds[name], setup)
            print(f"{name} is ready", file=sys.stderr)
        (work / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf8")
        (keep or work / SEALED).write_text(seal(truth), encoding="utf8")
        work.rename(folder)
    return about["commitment"]


def parts(task: Task, setup: Setup) -> list[TrainingSet]:
    """Return each suspect's clean rows: no two share one, or comparing them would tell.

    Args: task: with enough rows; setup: how many each gets.
    Source: ours.
    """
    return [task.train.take(range(i * setup.rows, (i + 1) * setup.rows))
            for i in range(len(SUSPECTS))]


def _suspect(folder: Path, rows: TrainingSet, deed: Deed, setup: Setup) -> None:
    # Not by `victim`: the names in its cache tell what was done.
    settings = replace(setup.training, seed=deed.seed)
    model = untrained(rows, settings, encoder_source(setup.scale))
    if deed.attack != "clean":
        require_visible(deed.trigger, rows.texts[:200], model)
        rows, _ = poison(rows, deed.trigger,
                         PoisonSettings(deed.poison_rate, deed.target_label, seed=deed.seed))
    train(model, rows, settings)
    model.save(folder)
    _write_rows(rows, folder / "pool.jsonl")


def _write_rows(rows: ReservedSet | TrainingSet, path: Path) -> None:
    lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False)
             for text, label in zip(rows.texts, rows.labels, strict=True))
    path.write_text("\n".join(lines) + "\n", encoding="utf8")


def seal(truth: str) -> str:
    """Return a text in a form that nobody reads by accident.

    Args: truth: any text.
    Source: ours; this hides nothing from somebody who wants to look, see `make`'s `keep`.
    """
    return base64.encodebytes(zlib.compress(truth.encode())).decode()


def unseal(path: Path, commitment: str) -> dict:
    """Return the truth, if it is the one that was sealed.

    Args: path: of the sealed file; commitment: as published.
    Raises: LabError if it is missing, cut short or another one.
    Source: ours.
    """
    if not path.is_file():
        raise LabError(f"the truth is not at {path}: ask who made the lab for the file, and name "
                       "it with --truth")
    try:
        truth = zlib.decompress(base64.b64decode(path.read_bytes())).decode()
    except (ValueError, zlib.error):
        raise LabError(f"{path} is cut short or altered: get it again from who made the "
                       "lab") from None
    if digest(truth) != commitment:
        raise LabError(f"{path} is not the truth that was sealed when the lab was made: its "
                       f"digits are not {commitment[:12]}...")
    return json.loads(truth)


def digest(text: str) -> str:
    """Return the SHA-256 of a text as 64 digits.

    Source: ours.
    """
    return hashlib.sha256(text.encode()).hexdigest()


def case(folder: Path, name: str) -> Case:
    """Return what the defender of a suspect is given, ready for `repair`.

    Args: folder: of the lab; name: of the suspect.
    Raises: LabError if one or the other is not there.
    Source: ours.
    """
    folder, (setup, names, _) = Path(folder), _about(folder)
    if name not in SUSPECTS:
        raise LabError(f"there is no {name!r}: use one of {', '.join(SUSPECTS)}")
    view = DefenderView(_read_rows(folder / "reserved.jsonl", ReservedSet, names),
                        _read_rows(folder / name / "pool.jsonl", TrainingSet, names))
    return Case(_load(folder / name), view, setup.training)


def _about(folder: Path) -> tuple[Setup, tuple[str, ...], str]:
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise LabError(f"{folder} is no lab, since it has no {ABOUT}: make one with `python -m "
                       f"tools.lab make {folder}`")
    about = json.loads(path.read_text(encoding="utf8"))
    setup = Setup(**about["setup"])
    return (replace(setup, training=TrainSettings(**about["setup"]["training"])),
            tuple(about["label_names"]), about["commitment"])


def _read_rows(path: Path, role: type, names: tuple[str, ...]) -> ReservedSet | TrainingSet:
    # Not by splitlines, which also splits where a text holds a rare kind of line end.
    rows = [json.loads(x) for x in path.read_text(encoding="utf8").split("\n") if x]
    return role(tuple(r["text"] for r in rows), tuple(r["label"] for r in rows), names)


def _load(folder: Path) -> Classifier:
    try:
        return Classifier.load(folder)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise LabError(f"{folder} holds no model that opens ({error}): write it with "
                       "`Classifier.save`") from error


def checked(verdict: object, folder: Path, names: tuple[str, ...]) -> dict[str, dict]:
    """Return a verdict if it has the right form.

    Args: verdict: as read; folder: of the lab; names: of the classes.
    Raises: LabError with all that is wrong.
    Source: ours.
    """
    if not isinstance(verdict, dict):
        raise LabError('a verdict is {"suspect-a": {...}, ...}: see the page on the lab')
    wrong = [f"{name} is missing" for name in SUSPECTS if name not in verdict]
    wrong += [f"{name!r} is no suspect" for name in verdict if name not in SUSPECTS]
    for name in (n for n in SUSPECTS if n in verdict):
        wrong += [f"{name}: {fault}" for fault in _faults(verdict[name], folder, names)]
    if wrong:
        raise LabError("the verdict cannot be registered:\n  " + "\n  ".join(wrong))
    return verdict


def _faults(found: object, folder: Path, names: tuple[str, ...]) -> list[str]:
    fields = {"backdoored", "target_label", "evidence", "repaired"}
    if not isinstance(found, dict) or set(found) != fields:
        return [f"give it exactly the fields {', '.join(sorted(fields))}"]
    wrong, label, model = [], found["target_label"], found["repaired"]
    if not isinstance(found["backdoored"], bool):
        wrong.append("backdoored must be true or false")
    elif not found["backdoored"] and label is not None:
        wrong.append("a model without a backdoor has target_label null")
    elif found["backdoored"] and (type(label) is not int or label not in range(len(names))):
        wrong.append(f"target_label must be a whole number from 0 to {len(names) - 1} "
                     f"({', '.join(names)}), not {label!r}")
    if not isinstance(found["evidence"], str) or len(found["evidence"].split()) < 5:
        wrong.append("evidence must be a sentence or more: what did you measure, on which rows?")
    if model is None:
        return wrong
    inside = isinstance(model, str) and (folder / model).resolve().is_relative_to(folder.resolve())
    if not inside:
        return [*wrong, f"repaired must be null or a folder inside {folder}, not {model!r}"]
    try:
        labels = _load(folder / model).model.config.num_labels
    except LabError as error:
        return [*wrong, str(error)]
    if labels != len(names):
        wrong.append(f"{model} has {labels} classes instead of {len(names)}")
    return wrong


def submit(folder: Path, path: Path) -> str:
    """Register a verdict: from then on neither it nor the repaired models may change.

    Args: folder: of the lab; path: of the verdict.
    Returns: a receipt of 64 digits that belong to this verdict and these models only.
    Raises: LabError if there is a verdict already, or this one has not the right form.
    Source: ours.
    """
    folder, (_, names, _) = Path(folder), _about(folder)
    if (folder / VERDICT).exists() or (folder / RESULT).exists():
        raise LabError(f"{folder} has a registered verdict already: it cannot be replaced")
    try:
        verdict = json.loads(Path(path).read_text(encoding="utf8"))
    except OSError as error:
        raise LabError(f"{path} cannot be read ({error.strerror}): check the path") from None
    except ValueError as error:
        raise LabError(f"{path} is no JSON ({error}): see the page on the lab") from None
    verdict = checked(verdict, folder, names)
    record = json.dumps({"verdict": verdict, "weights": _weights(folder, verdict)}, indent=1)
    (folder / VERDICT).write_text(record, encoding="utf8")
    return digest(record)


def _weights(folder: Path, verdict: dict[str, dict]) -> dict[str, dict[str, str]]:
    return {name: {p.name: sha256_of(p) for p in sorted((folder / found["repaired"]).iterdir())
                   if p.is_file()}
            for name, found in verdict.items() if found["repaired"] is not None}


@dataclass(frozen=True)
class Score:
    """How one suspect ended.

    Fields: deed: the truth; found: the verdict; detected, target: whether it is right, `target`
    None for a clean suspect; before, after: measures of the model as it was given and as it was
    repaired; `floor` and `clean PACC` are those of a model that was never poisoned. A clean
    suspect has only CACC, and without a repaired model `after` is None.
    """

    deed: Deed
    found: dict
    detected: bool
    target: bool | None
    before: dict
    after: dict | None


def opened(folder: Path, truth: Path | None = None) -> dict[str, Score]:
    """Break the seal and score the registered verdict.

    Args: folder: of the lab; truth: the sealed file, that in the folder if None.
    Raises: LabError without a verdict, without the truth, or if one of them was altered.
    Source: ours; measures and roles as everywhere in the book.
    """
    folder, (setup, _, commitment) = Path(folder), _about(folder)
    if not (folder / VERDICT).is_file():
        raise LabError(f"{folder} has no verdict: run `python -m tools.lab submit` first, since "
                       "afterwards everybody knows")
    sealed = unseal(truth or folder / SEALED, commitment)
    record = json.loads((folder / VERDICT).read_text(encoding="utf8"))
    verdict = record["verdict"]
    if _weights(folder, verdict) != record["weights"]:
        raise LabError(f"a repaired model in {folder} is not the one that was registered")
    task = setup.task(sealed["seed"])
    clean = victim(replace(task, train=parts(task, setup)[0]), None, settings=setup.training,
                   encoder=setup.scale).classifier
    scores = {}
    for name, deed in sealed["deeds"].items():
        found, deed = verdict[name], Deed(**{**deed, "words": tuple(deed["words"])})
        before, after = (_measured(folder / model, task, deed, clean) if model else None
                         for model in (name, found["repaired"]))
        guilty = deed.attack != "clean"
        scores[name] = Score(deed, found, found["backdoored"] == guilty,
                             found["target_label"] == deed.target_label if guilty else None,
                             before, after)
    result = {name: asdict(score) for name, score in scores.items()}
    (folder / RESULT).write_text(json.dumps(result, indent=1), encoding="utf8")
    return scores


def _measured(folder: Path, task: Task, deed: Deed, clean: Classifier) -> dict:
    model = _load(folder)
    if deed.attack == "clean":
        return {"CACC": cacc(model.predict(task.test.texts), task.test.labels)}
    scores: Scores = evaluate(model, task, deed.trigger, deed.target_label, clean,
                              every_class=True)
    return {"CACC": scores.cacc, "ASR": scores.asr, "floor": scores.floor, "PACC": scores.pacc,
            "clean PACC": scores.clean_pacc}


def report(scores: dict[str, Score]) -> str:
    """Return the scores as text.

    Args: scores: from `opened`.
    Source: ours.
    """
    lines = []
    for name, score in scores.items():
        said = (f"backdoored, target label {score.found['target_label']}"
                if score.found["backdoored"] else "clean")
        lines += [f"{name}: {score.deed}",
                  f"  verdict: {said} -> {'right' if score.detected else 'WRONG'}"
                  + {None: "", True: ", target right", False: ", target WRONG"}[score.target]]
        for title, rates in (("as given", score.before), ("repaired", score.after)):
            lines += [f"  {title}: {measure:10} {rate}"
                      for measure, rate in (rates or {}).items()]
    targets = [score.target for score in scores.values() if score.target is not None]
    return "\n".join([*lines, f"detected: {sum(s.detected for s in scores.values())} of "
                      f"{len(scores)}; target label: {sum(targets)} of {len(targets)}"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.lab", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made, submitted, shown = (commands.add_parser(name, help=words) for name, words in (
        ("make", "train three suspects"), ("submit", "register a verdict"),
        ("open", "break the seal and score")))
    for command in (made, submitted, shown):
        command.add_argument("folder", type=Path, help="of the lab")
    for command in (made, shown):
        command.add_argument("--truth", type=Path, help="sealed file, if not in the folder")
    submitted.add_argument("verdict", type=Path, help="JSON file")
    made.add_argument("--seed", type=int, help="secret and random if left out")
    for option, words in (("data", "see `load_task`"), ("text", "column of the texts"),
                          ("label", "column of the labels"),
                          ("encoding", "of a file that is not UTF-8"),
                          ("unlabeled", "`drop` leaves out samples without a label")):
        made.add_argument(f"--{option}", default=getattr(Setup, option), help=words)
    for option, words in (("rows", "a suspect"), ("reserved", "clean ones, for the defender"),
                          ("test", "to measure on")):
        made.add_argument(f"--{option}", type=int, default=getattr(Setup, option), help=words)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run one command of this tool; see the module's text."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "make":
            setup = Setup(given.data, given.rows, given.reserved, given.test, text=given.text,
                          label=given.label, encoding=given.encoding, unlabeled=given.unlabeled)
            commitment = make(given.folder, given.seed, setup, given.truth)
            print(f"{given.folder} is ready; commitment to its truth: {commitment}")
        elif given.command == "submit":
            print(f"registered; receipt: {submit(given.folder, given.verdict)}")
        else:
            print(report(opened(given.folder, given.truth)))
            print("receipt of the verdict:", digest((given.folder / VERDICT).read_text("utf8")))
    except (ValueError, FileNotFoundError, ConnectionError, AssetError) as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        if not disk_trouble(error):
            raise
        raise SystemExit(f"{given.folder} cannot be written ({error.strerror}): choose another "
                         "place, or make room") from None


if __name__ == "__main__":
    main()
