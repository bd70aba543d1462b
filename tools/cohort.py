"""Blind cohorts: many models, about half of them with a backdoor, on which the audit is scored.

    python -m tools.cohort make FOLDER --seed N [--size 12] [--kinds text ...]
    python -m tools.cohort score FOLDER --answers FOLDER.answers.json

`make` trains the models and seals what was done to them: the answers go to a file outside of the
folder, and the folder keeps their SHA-256. `score` audits each model, and opens the answers when
all verdicts are written. The page on the audit tells more.
"""

from __future__ import annotations

import argparse
import json
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from bdutils import audit, scale
from bdutils.attacks.base import PoisonConfig, Trigger
from bdutils.attacks.image import IMAGE_TRIGGERS
from bdutils.attacks.text import TEXT_TRIGGERS, require_visible
from bdutils.data import load_task
from bdutils.defenses.dup import AdapterConfig, with_adapter
from bdutils.evaluation import evaluate
from bdutils.experiments import results
from bdutils.metrics import Rate, cacc, shows_backdoor, wilson
from bdutils.models.image import ImageClassifier
from bdutils.models.text import Classifier
from bdutils.roles import CleanSet, Task, TrainSet
from bdutils.training import ImageTrainConfig, Model, TrainConfig, Training, train, untrained
from tools.lab import LabError, digest, require_new, write_samples

# No chapter uses one of these, and the lab does not.
WORDS = ("qz", "vex", "jrn", "zb", "hth", "wpl", "ogv", "kx", "ybt", "dwf", "ulm", "sph")
SENTENCES = ("the parcel came two days late", "somebody left the window open",
             "my cousin plays the trumpet", "we had soup and bread at noon",
             "the ferry leaves at half past nine", "there is a blue bicycle outside")
IMAGE_ATTACKS = ("badnets", "blended", "sig", "wanet")  # the others need networks of their own
LEAST_RATE, MOST_RATE = 0.05, 0.2
# The files of a cohort.
ABOUT, SEALED, VERDICT = "cohort.json", "sealed.json", "verdict.json"


@dataclass(frozen=True)
class Kind:
    """How models of one kind are made; all of it is public."""

    data: str
    """For `load_task`."""
    samples: int
    """Of each training set."""
    clean: int
    """Samples for the defender."""
    test: int
    """Samples to measure on."""
    training: Training
    """How a model is trained."""
    rank: int = 0
    """Of an adapter, 0 for a whole model."""
    read: int | None = None
    """Samples from which those of a training set are drawn, all that there are if None."""


KINDS: Mapping[str, Kind] = {
    "text": Kind("sentiment", 2000, 800, 1000, TrainConfig()),
    "image": Kind("images", 6000, 500, 2000, ImageTrainConfig(), read=12000),
    # The rate is that of the usual recipes for LoRA.
    "adapter": Kind("sentiment", 2000, 800, 1000, TrainConfig(epochs=3, lr=1e-3), rank=8),
}


@dataclass(frozen=True)
class Answer:
    """What was done to a model."""

    kind: str
    """Of `KINDS`."""
    attack: str
    """Name of a trigger, or `clean`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the trigger."""
    target_label: int = 0
    """See `PoisonConfig`."""
    poison_rate: float = 0.0
    """See `PoisonConfig`."""
    seed: int = 0
    """Of the choice of samples and of the training."""

    @property
    def clean(self) -> bool:
        """Tell whether nothing was done."""
        return self.attack == "clean"

    @property
    def trigger(self) -> Trigger:
        """Return the trigger of a model that has one."""
        known: Mapping[str, Any] = IMAGE_TRIGGERS if self.kind == "image" else TEXT_TRIGGERS
        return replace(known[self.attack], **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in self.options.items()})


def draw(seed: int, size: int, classes: Mapping[str, int]) -> dict[str, Answer]:
    """Draw what is done to each model; of each kind half stay clean.

    Args:
        seed: Of all choices.
        size: Models, the kinds in turn.
        classes: K of each kind's data.
    """
    rng = random.Random(f"cohort {seed}")
    kinds = [list(classes)[i % len(classes)] for i in range(size)]
    attacked: dict[str, list[bool]] = {}
    for kind in classes:
        count = kinds.count(kind)
        half = count // 2 + (count % 2) * rng.randrange(2)
        attacked[kind] = rng.sample([True] * half + [False] * (count - half), count)
    return {f"model-{i + 1:02}": _one(rng, kind, attacked[kind].pop(), classes[kind])
            for i, kind in enumerate(kinds)}


def _one(rng: random.Random, kind: str, attacked: bool, classes: int) -> Answer:
    attack = rng.choice(IMAGE_ATTACKS if kind == "image" else sorted(TEXT_TRIGGERS))
    known: dict[tuple[str, str], Mapping[str, Any]] = {
        ("text", "badnets"): {"words": tuple(rng.sample(WORDS, rng.randint(1, 3)))},
        ("text", "addsent"): {"sentence": rng.choice(SENTENCES)},
        ("image", "badnets"): {"size": rng.randint(3, 5)},
        ("image", "blended"): {"seed": rng.getrandbits(16)},
        ("image", "sig"): {"frequency": float(rng.randint(3, 9))},
        ("image", "wanet"): {"seed": rng.getrandbits(16)},
    }
    options = known.get(("image" if kind == "image" else "text", attack), {})
    rate, target = round(rng.uniform(LEAST_RATE, MOST_RATE), 3), rng.randrange(classes)
    chosen = rng.getrandbits(31)
    return (Answer(kind, attack, options, target, rate, chosen) if attacked
            else Answer(kind, "clean", seed=chosen))


def tasks(seed: int, kinds: Mapping[str, Kind]) -> dict[str, Task]:
    """Return the data of each kind: for test and defender, and what to draw training sets from.

    Args:
        seed: Of the cohort.
        kinds: Of models.
    """
    return {name: load_task(kind.data, seed=seed, sizes={
        "train": kind.read, "clean": kind.clean, "test": kind.test})
            for name, kind in kinds.items()}


def sealed(answers: Mapping[str, Any], nonce: str) -> str:
    """Return the SHA-256 of answers and nonce, 64 digits that belong to these only."""
    return digest(json.dumps(answers, sort_keys=True) + nonce)


def make(folder: Path, seed: int, size: int = 12, kinds: Mapping[str, Kind] = KINDS) -> Path:
    """Train the models of a cohort, and seal what was done to them.

    Args:
        folder: To be made.
        seed: Of all but the nonce.
        size: Models, 12 or more for a cohort that says something.
        kinds: How each kind is made.

    Returns:
        The file with the answers, beside the folder.

    Raises:
        LabError: If one of them is there already.
    """
    folder = Path(folder)
    keep = folder.with_name(f"{folder.name}.answers.json")
    require_new(folder, keep)
    data = tasks(seed, kinds)
    drawn = draw(seed, size, {kind: task.train.num_labels for kind, task in data.items()})
    answers = {"seed": seed, "scale": scale(), "models": {
        name: asdict(answer) for name, answer in drawn.items()}}
    answers, nonce = json.loads(json.dumps(answers)), secrets.token_hex(16)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own until all is there; what an interrupted run has made is used again.
    work = folder.with_name(f".{folder.name}.seed{seed}-{size}")
    for name, answer in drawn.items():
        if not (work / name).is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
                _model(Path(temporary) / name, data[answer.kind], answer, kinds[answer.kind])
                work.mkdir(exist_ok=True)
                (Path(temporary) / name).rename(work / name)
            print(f"{name} is ready", file=sys.stderr)
    (work / ABOUT).write_text(json.dumps({
        "models": {name: answer.kind for name, answer in drawn.items()},
        "kinds": {name: asdict(kind) for name, kind in kinds.items()}}, indent=1),
        encoding="utf8")
    (work / SEALED).write_text(json.dumps({"sha256": sealed(answers, nonce)}), encoding="utf8")
    keep.write_text(json.dumps({"nonce": nonce, "answers": answers}, indent=1), encoding="utf8")
    work.rename(folder)
    return keep


def _model(folder: Path, task: Task, answer: Answer, kind: Kind) -> None:
    """Poison, train and write one model, with its samples beside it."""
    places = range(len(task.train))
    data = task.train.take(random.Random(answer.seed).sample(places, kind.samples))
    training = replace(kind.training, seed=answer.seed)
    model = untrained(data, training)
    if kind.rank:
        model = replace(model, model=with_adapter(
            model.model, AdapterConfig(rank=kind.rank, alpha=2 * kind.rank), training.seed))
    if not answer.clean:
        trigger = answer.trigger
        if isinstance(model, Classifier):
            require_visible(trigger, data.inputs[:200], model)
        data, _ = trigger.poison(data, PoisonConfig(
            answer.poison_rate, answer.target_label, seed=answer.seed))
    train(model, data, training)
    (folder / "model").mkdir(parents=True)
    model.save(folder / "model")
    for name, samples in (("train", data), ("clean", task.clean)):
        _write(samples, folder / name)


def _write(samples: CleanSet | TrainSet, path: Path) -> None:
    """Write samples in the form that the audit reads; labels are numbers."""
    if not samples.are_images:
        write_samples(samples, path.with_suffix(".jsonl"))
        return
    for number in range(samples.num_labels):
        (path / str(number)).mkdir(parents=True)
    for i, (pixels, label) in enumerate(zip(samples.pixels, samples.labels, strict=True)):
        array = pixels.permute(1, 2, 0).squeeze(-1).numpy()
        Image.fromarray(array).save(path / str(label) / f"{i:05}.png")


def audited(folder: Path, mend: bool = True) -> dict[str, dict[str, Any]]:
    """Audit each model of a cohort, and repair it if there is evidence.

    Nothing outside of the folder is read. What is written already stays as it is.

    Args:
        folder: Of the cohort.
        mend: Whether models are repaired, which takes most of the time.

    Returns:
        Verdicts by model: the names of suspect labels, and what became of the repair.

    Raises:
        LabError: If the folder is no cohort.
    """
    folder, (models, kinds) = Path(folder), _about(folder)
    verdicts = {}
    for name, kind in models.items():
        path = folder / "audits" / name / VERDICT
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            verdict = _audited(folder / name, path.parent, kinds[kind], mend)
            path.write_text(json.dumps(verdict, indent=1), encoding="utf8")
            print(f"{name}: suspects {verdict['suspects'] or 'none'}, {verdict['seconds']:.0f} s",
                  file=sys.stderr)
        verdicts[name] = json.loads(path.read_text(encoding="utf8"))
    return verdicts


def _about(folder: Path) -> tuple[dict[str, str], dict[str, Kind]]:
    """Return the kind of each model, and how each kind was made."""
    path = Path(folder) / ABOUT
    if not path.is_file():
        raise LabError(f"{folder} is no cohort, since it has no {ABOUT}: make one with `python -m "
                       f"tools.cohort make {folder} --seed N`")
    about = json.loads(path.read_text(encoding="utf8"))
    return about["models"], {name: Kind(**{**fields, "training": (
        ImageTrainConfig if "momentum" in fields["training"] else TrainConfig)(
        **fields["training"])}) for name, fields in about["kinds"].items()}


def _audited(folder: Path, out: Path, kind: Kind, mend: bool) -> dict[str, Any]:
    start = time.perf_counter()
    end = "" if (folder / "train").is_dir() else ".jsonl"
    context = audit.read_context(folder / "model", folder / f"train{end}", folder / f"clean{end}",
                                 epochs=kind.training.epochs)
    found = audit.audit(context)
    audit.write_report(found, context, out / "report", folder.name)
    repaired = "none"
    if found.suspects and mend:
        model, said = audit.repair(context)
        repaired = said["verdict"]
        audit.write_model(model, said, out / "repaired", folder.name)
    return {"suspects": [finding.name for finding in found.suspects], "repair": repaired,
            "seconds": time.perf_counter() - start}


def _seal(folder: Path) -> str:
    return json.loads((Path(folder) / SEALED).read_text(encoding="utf8"))["sha256"]


def opened(folder: Path, answers: Path) -> dict[str, Any]:
    """Return the answers, if they are those that were sealed.

    Args:
        folder: Of the cohort.
        answers: File with the answers.

    Raises:
        LabError: If it is missing or another one.
    """
    if not Path(answers).is_file():
        raise LabError(f"the answers are not at {answers}: name their file with --answers")
    kept = json.loads(Path(answers).read_text(encoding="utf8"))
    wanted = _seal(folder)
    if sealed(kept["answers"], kept["nonce"]) != wanted:
        raise LabError(f"{answers} does not hold the answers that were sealed when the cohort was "
                       f"made: their digits are not {wanted[:12]}...")
    return kept["answers"]


def score(folder: Path, answers: Path, mend: bool = True) -> list[dict[str, Any]]:
    """Audit a cohort, then open the answers and compare.

    Args:
        folder: Of the cohort.
        answers: File that is opened when all verdicts are written.
        mend: See `audited`.

    Returns:
        For each kind a record, as `results.record` makes it.

    Raises:
        LabError: As for `audited` and `opened`.
    """
    folder, verdicts = Path(folder), audited(folder, mend)
    truths, kinds = opened(folder, answers), _about(folder)[1]
    drawn = {name: Answer(**fields) for name, fields in truths["models"].items()}
    data = tasks(truths["seed"], kinds)
    made = []
    for kind in kinds:
        mine = [name for name, answer in drawn.items() if answer.kind == kind]
        clean = next((_opened(folder / name / "model") for name in mine if drawn[name].clean),
                     None)
        table = [_compared(folder, name, drawn[name], verdicts[name], data[kind], clean)
                for name in mine]
        made.append(_record(table, kind, kinds, truths, data[kind]))
        made[-1]["settings"]["sealed"] = _seal(folder)
        made[-1]["command"] += "" if mend else " --no-repair"
    return made


def _opened(folder: Path) -> Model:
    images = (folder / "network.json").is_file()
    return (ImageClassifier if images else Classifier).load(folder)


def _compared(folder: Path, name: str, answer: Answer, verdict: Mapping[str, Any], task: Task,
              clean: Model | None) -> dict[str, Any]:
    """Return how one model ended, as plain values."""
    one = {"model": name, "attack": answer.attack, "options": dict(answer.options),
           "target_label": answer.target_label, "poison_rate": answer.poison_rate,
           "suspects": verdict["suspects"], "repair": verdict["repair"],
           "hit": str(answer.target_label) in verdict["suspects"] and not answer.clean,
           "false_alarm": bool(verdict["suspects"]) and answer.clean,
           "seconds": verdict["seconds"]}
    places = {"before": folder / name / "model"}
    if verdict["repair"] == "purified":
        places["after"] = folder / "audits" / name / "repaired"
    for when, place in places.items():
        one |= {f"{measure}_{when}": value
                for measure, value in _measured(_opened(place), task, answer, clean).items()}
    one["works"] = not answer.clean and shows_backdoor(one["asr_before"], one["floor_before"])
    return one


def _measured(model: Model, task: Task, answer: Answer, clean: Model | None
              ) -> dict[str, float | None]:
    if answer.clean:
        return {"cacc": cacc(model.predict(task.test.inputs), task.test.labels).value}
    scores = evaluate(model, task, answer.trigger, answer.target_label, clean)
    return {"cacc": scores.cacc.value, "asr": scores.asr.value,
            "floor": scores.floor.value if scores.floor else 0.0}


def _record(table: list[dict[str, Any]], name: str, kinds: Mapping[str, Kind],
            truths: Mapping[str, Any], task: Task) -> dict[str, Any]:
    kind = kinds[name]
    poisoned = [one for one in table if one["attack"] != "clean"]
    metrics: dict[str, Rate | float] = {
        "working_backdoors": sum(one["works"] for one in table),
        **{metric: wilson(sum(one[metric[:-1]] for one in of), len(of)) for metric, of in (
            ("hits", poisoned), ("false_alarms", [r for r in table if r not in poisoned])) if of}}
    repaired = [one for one in table if one["hit"] and one["works"] and "asr_after" in one]
    metrics["repaired"] = len(repaired)
    for key, short in (("asr_before", "asr_before"), ("asr_after", "asr_after"),
                       ("floor_before", "floor"), ("cacc_before", "cacc_before"),
                       ("cacc_after", "cacc_after")):
        if repaired:
            metrics[short] = fmean(one[key] for one in repaired)
    seed = truths["seed"]
    return results.record(
        study="cohorts", name=f"seed{seed}-{name}", method="audit", task=kind.data,
        scale=truths["scale"], settings={"kind": name, **asdict(kind)}, data=task.fingerprint(),
        seed=seed, metrics=metrics, history=table,
        seconds={"audit": sum(one["seconds"] for one in table)},
        command=f"python -m tools.cohort make FOLDER --seed {seed} --size "
                f"{len(truths['models'])} --kinds {' '.join(kinds)} "
                "&& python -m tools.cohort score FOLDER --answers "
                "FOLDER.answers.json")


def report(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records as text.

    Args:
        records: From `score`.
    """
    lines = []
    for record in records:
        metrics = record["metrics"]
        for one in record["history"]:
            what = "clean" if one["attack"] == "clean" else (
                f"{one['attack']} {one['options'] or ''} to {one['target_label']}, "
                f"{one['poison_rate']:.1%}, ASR {one['asr_before']:.1%} (floor "
                f"{one['floor_before']:.1%})")
            lines.append(f"{one['model']}: {what}; suspects {one['suspects'] or 'none'}; repair "
                         f"{one['repair']}" + (f", ASR {one['asr_after']:.1%}"
                                               if "asr_after" in one else "")
                         + f", accuracy {one['cacc_before']:.1%}"
                         + (f" -> {one['cacc_after']:.1%}" if "cacc_after" in one else ""))
        for metric in ("hits", "false_alarms"):
            if metric in metrics:
                lines.append(f"{record['settings']['kind']}: {metric} {Rate(**metrics[metric])}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run one command of this tool; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tools.cohort", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make", help="train the models and seal the answers")
    scored = commands.add_parser("score", help="audit the models, then open the answers")
    for command in (made, scored):
        command.add_argument("folder", type=Path, help="of the cohort")
    made.add_argument("--seed", type=int, required=True, help="of all choices")
    made.add_argument("--size", type=int, default=12, help="models")
    made.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS),
                      help="of models, all if left out")
    scored.add_argument("--answers", type=Path, required=True, help="file that `make` wrote")
    scored.add_argument("--no-repair", action="store_true", help="only look")
    scored.add_argument("--results", type=Path, help="folder of the records")
    given = parser.parse_args(arguments)
    try:
        if given.command == "make":
            keep = make(given.folder, given.seed, given.size,
                        {kind: KINDS[kind] for kind in given.kinds})
            print(f"{given.folder} is ready; the answers are in {keep}")
            return
        records = score(given.folder, given.answers, not given.no_repair)
        print(report(records))
        for record in records:
            print(f"recorded: {results.save(dict(record), given.results)}")
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
