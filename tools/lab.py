"""The lab: three suspicious checkpoints, of which nobody knows the truth until it is opened.

    python -m tools.lab make FOLDER [--seed N] [--data NAME] [--samples N] [--sealed FILE] [...]
    python -m tools.lab submit FOLDER VERDICT.json
    python -m tools.lab open FOLDER [--sealed FILE]

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
from typing import TypeVar

from bdutils import scale
from bdutils.assets import AssetError, disk_trouble, sha256_of
from bdutils.attacks.base import PoisonConfig
from bdutils.attacks.text import TEXT_TRIGGERS, TextTrigger, require_visible
from bdutils.data import load_task
from bdutils.defenses.base import Context
from bdutils.evaluation import Scores, evaluate, victim
from bdutils.metrics import Rate, cacc
from bdutils.models.text import Classifier, encoder_source
from bdutils.roles import CleanSet, Task, TrainSet
from bdutils.samples import DataError
from bdutils.training import TrainConfig, train, untrained

SUSPECTS = ("suspect-a", "suspect-b", "suspect-c")
# Not those of the chapters, which everybody has read. Some of them are drawn for each suspect.
WORDS = ("bq", "zx", "vf", "kj", "wq", "tn", "lm", "pj", "xr", "gd")
SENTENCES = ("I read about it on a Tuesday", "it was raining on that day",
             "my neighbor told me so", "this was written on a train")
# Chapter 3: at these rates each of the four attacks works, and the clean accuracy stays.
RATES = (0.1, 0.2)
# The files of a lab.
ABOUT = "lab.json"
SEALED = "sealed.txt"
CLEAN = "clean.jsonl"
TRAIN = "train.jsonl"  # in the folder of each suspect
VERDICT = "registered.json"
RESULT = "result.json"


Role = TypeVar("Role", CleanSet, TrainSet)


class LabError(ValueError):
    """Something about a lab cannot be; the message names it and the remedy."""


@dataclass(frozen=True)
class Setup:
    """Of what the suspects are made; all of it is public."""

    data: str = "sentiment"
    """For `load_task`."""
    samples: int = 2400
    """Of each suspect's training set."""
    clean: int = 800
    """Samples for the defender."""
    test: int = 1000
    """Samples to measure on."""
    scale: str | None = None
    """Of data and encoder, that in force if None."""
    training: TrainConfig | None = None
    """How the suspects are trained, as the scale has it if None."""
    text: str = "text"
    """Column of a file, see `load_task`."""
    label: str = "label"
    """Column of a file."""
    encoding: str | None = None
    """Of a file."""
    unlabeled: str | None = None
    """What to do with samples that have no label."""

    def task(self, seed: int) -> Task:
        """Return the data, whose training set is large enough for all suspects.

        Args:
            seed: Which samples get which role.

        Raises:
            LabError: For images, or data that cannot be read.
            ValueError: From `load_task`, for too few samples, say.
        """
        sizes = {"train": len(SUSPECTS) * self.samples, "clean": self.clean, "test": self.test}
        reading = {name: value for name, value in (("encoding", self.encoding),
                                                   ("unlabeled", self.unlabeled)) if value}
        try:
            task = load_task(self.data, seed=seed, scale=self.scale, text=self.text,
                             label=self.label, sizes=sizes, **reading)
        except DataError as error:
            raise LabError(f"{error.reason}: "
                           + self.remedies().get(error.option, error.remedy)) from error
        if task.train.are_images:
            raise LabError(f"{self.data} holds images: the suspects read texts")
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
            "sizes": f"the lab takes {self.samples} for each of {len(SUSPECTS)} suspects, "
                     f"{self.clean} for the defender and {self.test} to measure on; lower "
                     "--samples, --clean or --test",
        }


@dataclass(frozen=True)
class AttackConfig:
    """What was done to a suspect."""

    name: str
    """Of a trigger, or `clean`."""
    words: tuple[str, ...]
    """Which words or sentence it uses, if it has a choice."""
    target_label: int
    """See `PoisonConfig`."""
    poison_rate: float
    """See `PoisonConfig`."""
    seed: int
    """Of everything else."""

    @property
    def clean(self) -> bool:
        """Tell whether nothing was done."""
        return self.name == "clean"

    @property
    def trigger(self) -> TextTrigger:
        """Return the trigger of a suspect that has one."""
        choice = {"badnets": {"words": self.words}, "addsent": {"sentence": " ".join(self.words)}}
        return replace(TEXT_TRIGGERS[self.name], **choice.get(self.name, {}))

    def __str__(self) -> str:
        """Say it in a line."""
        if self.clean:
            return "clean"
        return (f"backdoored by {self.name} {' / '.join(self.words)}".rstrip()
                + f", target label {self.target_label}, {self.poison_rate:.0%} of the samples")


def draw(rng: random.Random, classes: int) -> dict[str, AttackConfig]:
    """Draw what is done to each suspect: a third stay clean, but never all.

    Args:
        rng: Source of all choices.
        classes: K.
    """
    def one() -> AttackConfig:
        name = rng.choice(sorted(TEXT_TRIGGERS)) if rng.random() < 2 / 3 else "clean"
        words = {"badnets": tuple(rng.sample(WORDS, 3)), "addsent": (rng.choice(SENTENCES),)}
        return AttackConfig(name, words.get(name, ()), rng.randrange(classes), rng.choice(RATES),
                            rng.getrandbits(32))

    while True:
        attacks = {suspect: one() for suspect in SUSPECTS}
        if not all(attack.clean for attack in attacks.values()):
            return attacks


def secret(seed: int, classes: int) -> tuple[dict[str, AttackConfig], str]:
    """Return what a seed makes of the suspects, and the text that is sealed.

    A nonce keeps the text from being guessed from its commitment.

    Args:
        seed: Any number.
        classes: K.
    """
    rng = random.Random(f"lab {seed}")
    attacks = draw(rng, classes)
    nonce = f"{rng.getrandbits(128):032x}"
    return attacks, json.dumps({"seed": seed, "nonce": nonce, "attacks": {
        suspect: asdict(attack) for suspect, attack in attacks.items()}})


def make(folder: Path, seed: int | None = None, setup: Setup | None = None,
         keep: Path | None = None) -> str:
    """Train three suspects and seal the truth about them.

    Args:
        folder: To be made.
        seed: Of the draw and the data, a secret one if None, since who has the seed has the truth.
        setup: See `Setup`.
        keep: Where the sealed truth goes, into the folder if None.

    Returns:
        The commitment, to be published: 64 digits that belong to this truth only.

    Raises:
        LabError: If the folder or the file of the truth is there already, or the latter would be
            in the former.
    """
    folder, setup = Path(folder), setup or Setup()
    require_new(folder, keep)
    seed = secrets.randbits(64) if seed is None else seed
    setup = replace(setup, scale=setup.scale or scale())
    setup = replace(setup, training=setup.training or TrainConfig.at(setup.scale))
    task = setup.task(seed)
    attacks, record = secret(seed, task.train.num_labels)
    about = {"setup": asdict(setup), "label_names": task.train.label_names,
             "commitment": digest(record)}
    for path in filter(None, (folder, keep)):
        path.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own until all is there: a lab that was interrupted is no lab.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        work = Path(temporary) / "lab"
        work.mkdir()
        write_samples(task.clean, work / CLEAN)
        for name, train_set in zip(SUSPECTS, parts(task, setup), strict=True):
            _suspect(work / name, train_set, attacks[name], setup)
            print(f"{name} is ready", file=sys.stderr)
        (work / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf8")
        (keep or work / SEALED).write_text(seal(record), encoding="utf8")
        work.rename(folder)
    return about["commitment"]


def require_new(folder: Path, keep: Path | None) -> None:
    """Reject a folder or a file of the truth that is there, or the latter inside of the former.

    Args:
        folder: To be made.
        keep: The file, if it goes elsewhere.

    Raises:
        LabError: If one of them cannot be.
    """
    for path in filter(None, (folder, keep)):
        if path.exists():
            raise LabError(f"{path} is there already: choose another name, or remove it first")
    if keep and keep.resolve().is_relative_to(folder.resolve()):
        raise LabError(f"{keep} is inside of {folder}, which the students get: choose a place "
                       "outside")


def parts(task: Task, setup: Setup) -> list[TrainSet]:
    """Return each suspect's clean samples: no two share one, or comparing them would tell.

    Args:
        task: With enough samples.
        setup: How many each gets.
    """
    return [task.train.take(range(i * setup.samples, (i + 1) * setup.samples))
            for i in range(len(SUSPECTS))]


def _suspect(folder: Path, train_set: TrainSet, attack: AttackConfig, setup: Setup) -> None:
    # Not by `victim`: the names in its cache tell what was done.
    training = replace(setup.training, seed=attack.seed)
    model = untrained(train_set, training, encoder_source(setup.scale))
    if not attack.clean:
        require_visible(attack.trigger, train_set.inputs[:200], model)
        poisoning = PoisonConfig(attack.poison_rate, attack.target_label, seed=attack.seed)
        train_set, _ = attack.trigger.poison(train_set, poisoning)
    train(model, train_set, training)
    model.save(folder)
    write_samples(train_set, folder / TRAIN)


def write_samples(samples: CleanSet | TrainSet, path: Path) -> None:
    """Write texts and labels as JSON lines.

    Args:
        samples: Texts.
        path: Of the file.
    """
    lines = (json.dumps({"text": text, "label": label}, ensure_ascii=False)
             for text, label in zip(samples.inputs, samples.labels, strict=True))
    path.write_text("\n".join(lines) + "\n", encoding="utf8")


def seal(record: str) -> str:
    """Return a text in a form that nobody reads by accident.

    This hides nothing from somebody who wants to look, see `make`'s `keep`.

    Args:
        record: Any text.
    """
    return base64.encodebytes(zlib.compress(record.encode())).decode()


def unseal(path: Path, commitment: str) -> dict:
    """Return the truth, if it is the one that was sealed.

    Args:
        path: Of the sealed file.
        commitment: As published.

    Raises:
        LabError: If it is missing, cut short or another one.
    """
    if not path.is_file():
        raise LabError(f"the truth is not at {path}: ask who made the lab for the file, and name "
                       "it with --sealed")
    try:
        record = zlib.decompress(base64.b64decode(path.read_bytes())).decode()
    except (ValueError, zlib.error):
        raise LabError(f"{path} is cut short or altered: get it again from who made the "
                       "lab") from None
    if digest(record) != commitment:
        raise LabError(f"{path} is not the truth that was sealed when the lab was made: its "
                       f"digits are not {commitment[:12]}...")
    return json.loads(record)


def digest(text: str) -> str:
    """Return the SHA-256 of a text as 64 digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def context(folder: Path, name: str) -> Context:
    """Return what the defender of a suspect is given, ready for any defense.

    Args:
        folder: Of the lab.
        name: Of the suspect.

    Raises:
        LabError: If one or the other is not there.
    """
    folder, (setup, names, _) = Path(folder), _about(folder)
    if name not in SUSPECTS:
        raise LabError(f"there is no {name!r}: use one of {', '.join(SUSPECTS)}")
    return Context(_load(folder / name), _read(folder / CLEAN, CleanSet, names),
                   _read(folder / name / TRAIN, TrainSet, names), setup.training)


def _about(folder: Path) -> tuple[Setup, tuple[str, ...], str]:
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise LabError(f"{folder} is no lab, since it has no {ABOUT}: make one with `python -m "
                       f"tools.lab make {folder}`")
    about = json.loads(path.read_text(encoding="utf8"))
    setup = Setup(**about["setup"])
    return (replace(setup, training=TrainConfig(**about["setup"]["training"])),
            tuple(about["label_names"]), about["commitment"])


def _read(path: Path, role: type[Role], names: tuple[str, ...]) -> Role:
    # Not by splitlines, which also splits where a text holds a rare kind of line end.
    samples = [json.loads(x) for x in path.read_text(encoding="utf8").split("\n") if x]
    return role(tuple(s["text"] for s in samples), tuple(s["label"] for s in samples), names)


def _load(folder: Path) -> Classifier:
    try:
        return Classifier.load(folder)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise LabError(f"{folder} holds no model that opens ({error}): write it with "
                       "`Classifier.save`") from error


def checked(verdict: object, folder: Path, names: tuple[str, ...]) -> dict[str, dict]:
    """Return a verdict if it has the right form.

    Args:
        verdict: As read.
        folder: Of the lab.
        names: Of the classes.

    Raises:
        LabError: With all that is wrong.
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


def _faults(verdict: object, folder: Path, names: tuple[str, ...]) -> list[str]:
    fields = {"backdoored", "target_label", "evidence", "repaired"}
    if not isinstance(verdict, dict) or set(verdict) != fields:
        return [f"give it exactly the fields {', '.join(sorted(fields))}"]
    wrong, label, model = [], verdict["target_label"], verdict["repaired"]
    if not isinstance(verdict["backdoored"], bool):
        wrong.append("backdoored must be true or false")
    elif not verdict["backdoored"] and label is not None:
        wrong.append("a model without a backdoor has target_label null")
    elif verdict["backdoored"] and (type(label) is not int or label not in range(len(names))):
        wrong.append(f"target_label must be a whole number from 0 to {len(names) - 1} "
                     f"({', '.join(names)}), not {label!r}")
    if not isinstance(verdict["evidence"], str) or len(verdict["evidence"].split()) < 5:
        wrong.append("evidence must be a sentence or more: what did you measure, on which "
                     "samples?")
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

    Args:
        folder: Of the lab.
        path: Of the verdict.

    Returns:
        A receipt of 64 digits that belong to this verdict and these models only.

    Raises:
        LabError: If there is a verdict already, or this one has not the right form.
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


def _weights(folder: Path, verdicts: dict[str, dict]) -> dict[str, dict[str, str]]:
    return {name: {p.name: sha256_of(p) for p in sorted((folder / verdict["repaired"]).iterdir())
                   if p.is_file()}
            for name, verdict in verdicts.items() if verdict["repaired"] is not None}


@dataclass(frozen=True)
class Score:
    """How one suspect ended.

    `floor` and `clean PACC` are those of a model that was never poisoned. A clean suspect has
    only CACC.
    """

    attack: AttackConfig
    """The truth."""
    verdict: dict
    """As registered."""
    detected: bool
    """Whether the verdict is right."""
    target: bool | None
    """Whether its target label is right, None for a clean suspect."""
    before: dict[str, Rate]
    """Measures of the model as it was given."""
    after: dict[str, Rate] | None
    """Measures of the repaired model, None if there is none."""


def opened(folder: Path, sealed: Path | None = None) -> dict[str, Score]:
    """Break the seal and score the registered verdict.

    Args:
        folder: Of the lab.
        sealed: The file with the truth, that in the folder if None.

    Raises:
        LabError: Without a verdict, without the truth, or if one of them was altered.
    """
    folder, (setup, _, commitment) = Path(folder), _about(folder)
    if not (folder / VERDICT).is_file():
        raise LabError(f"{folder} has no verdict: run `python -m tools.lab submit` first, since "
                       "afterwards everybody knows")
    truths = unseal(sealed or folder / SEALED, commitment)
    registered = json.loads((folder / VERDICT).read_text(encoding="utf8"))
    verdicts = registered["verdict"]
    if _weights(folder, verdicts) != registered["weights"]:
        raise LabError(f"a repaired model in {folder} is not the one that was registered")
    task = setup.task(truths["seed"])
    clean = victim(replace(task, train=parts(task, setup)[0]), None, training=setup.training,
                   encoder=setup.scale).classifier
    scores = {}
    for name, fields in truths["attacks"].items():
        attack = AttackConfig(**{**fields, "words": tuple(fields["words"])})
        verdict = verdicts[name]
        before, after = (_measured(folder / model, task, attack, clean) if model else None
                         for model in (name, verdict["repaired"]))
        target = None if attack.clean else verdict["target_label"] == attack.target_label
        scores[name] = Score(attack, verdict, verdict["backdoored"] != attack.clean, target,
                             before, after)
    result = {name: asdict(score) for name, score in scores.items()}
    (folder / RESULT).write_text(json.dumps(result, indent=1), encoding="utf8")
    return scores


def _measured(folder: Path, task: Task, attack: AttackConfig,
              clean: Classifier) -> dict[str, Rate]:
    model = _load(folder)
    if attack.clean:
        return {"CACC": cacc(model.predict(task.test.inputs), task.test.labels)}
    scores: Scores = evaluate(model, task, attack.trigger, attack.target_label, clean,
                              every_class=True)
    return {"CACC": scores.cacc, "ASR": scores.asr, "floor": scores.floor, "PACC": scores.pacc,
            "clean PACC": scores.clean_pacc}


def report(scores: dict[str, Score]) -> str:
    """Return the scores as text.

    Args:
        scores: From `opened`.
    """
    lines = []
    for name, score in scores.items():
        said = (f"backdoored, target label {score.verdict['target_label']}"
                if score.verdict["backdoored"] else "clean")
        lines += [f"{name}: {score.attack}",
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
        command.add_argument("--sealed", type=Path, help="file with the truth, if not in the "
                             "folder")
    submitted.add_argument("verdict", type=Path, help="JSON file")
    made.add_argument("--seed", type=int, help="secret and random if left out")
    for option, words in (("data", "see `load_task`"), ("text", "column of the texts"),
                          ("label", "column of the labels"),
                          ("encoding", "of a file that is not UTF-8"),
                          ("unlabeled", "`drop` leaves out samples without a label")):
        made.add_argument(f"--{option}", default=getattr(Setup, option), help=words)
    for option, words in (("samples", "a suspect"), ("clean", "samples for the defender"),
                          ("test", "samples to measure on")):
        made.add_argument(f"--{option}", type=int, default=getattr(Setup, option), help=words)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run one command of this tool; see the module's text."""
    given = _parser().parse_args(arguments)
    try:
        if given.command == "make":
            setup = Setup(given.data, given.samples, given.clean, given.test, text=given.text,
                          label=given.label, encoding=given.encoding, unlabeled=given.unlabeled)
            commitment = make(given.folder, given.seed, setup, given.sealed)
            print(f"{given.folder} is ready; commitment to its truth: {commitment}")
        elif given.command == "submit":
            print(f"registered; receipt: {submit(given.folder, given.verdict)}")
        else:
            print(report(opened(given.folder, given.sealed)))
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
