"""The records' words became the field's: this changed them, once, and left every number as it was.

    python -m tools.migrate_records FOLDER      in place, and FOLDER/../numbers.json is written

Kept because `data/numbers.json` is made by it: for each record a digest of its numbers, taken
*before* anything was renamed. A test compares the records with it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

STUDIES = {"guards": "filters", "bedkd-pictures": "bedkd-images"}
FILES = {"defenses-pictures": "defenses-images"}  # of the study `throughput`
ATTACKS = {"patch": "badnets", "sine": "sig", "warp": "wanet", "input-aware": "input_aware",
           "corners": "label_consistent", "syntax": "synbkd", "style": "stylebkd"}
DEFENSES = {"tuning": "ft", "pruning": "fp", "sam": "ft_sam", "tuning-text": "ft-text",
            "sam-text": "ft_sam-text", "tuning-long": "ft-long", "pruning-long": "fp-long",
            "bedkd-pictures": "bedkd-images", "dup-no-kick": "dup-no-unlikelihood",
            "dup-all-pushed": "dup-all-unlearned", "dup-one-look": "dup-one-eval",
            "whole-passes": "whole-epochs"}
METRICS = {"refused": "rejected", "refused_clean": "rejected_clean",
           "accused": "suspect_samples", "accused_precision": "suspect_precision"}
SETTINGS = {"pictures": "images", "reserved": "clean", "pool": "train", "rows": "samples",
            "rows_read": "samples_read", "test_rows": "test_samples"}
CLASSES = {"WordTrigger": "BadNets", "SentenceTrigger": "AddSent", "SyntaxTrigger": "SynBkd",
           "StyleTrigger": "StyleBkd", "CornersTrigger": "LabelConsistent",
           "PictureSettings": "ImageTrainConfig", "PatchTrigger": "BadNetsPatch",
           "InputAwareTrigger": "InputAware", "LearnSettings": "GeneratorConfig",
           "BlendTrigger": "Blended", "SineTrigger": "SIG", "WarpTrigger": "WaNet"}
# Hyperparameters of a defense: where each of them is now.
LOSS = {name: f"loss.{name}" for name in ("ce_weight", "masked", "bounds")}
SCAN = {name: f"scan.{name}" for name in ("threshold", "fpr", "mean_gap", "shuffled", "alpha")}
BEDKD = LOSS | SCAN | {
    "dmm_temperature": "module.temperature", "dmm_epochs": "module.epochs",
    "scan_cap": "scan.max_flagged", "akd_temperature": "temperature",
    "punish_rows": "punish_samples"}
DETECTOR = {name: f"detector.{name}" for name in
            ("pooling", "shrinkage", "layers", "weight", "fpr")}
DUP = DETECTOR | {
    "rank": "adapter.rank", "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout",
    "modules": "adapter.modules", "lr": "unlearning.lr", "batch_size": "unlearning.batch_size",
    "passes": "unlearning.epochs", "steps": "unlearning.min_steps", "decay": "unlearning.decay",
    "push": "unlearning.weight", "keep": "unlearning.ce_weight", "cap": "unlearning.cap",
    "kick": "unlearning.unlikelihood", "gate": "unlearning.gate", "look": "stopping.eval_every",
    "stop": "stopping.stop", "slack": "stopping.tolerance", "tail": "stopping.average",
    "max_loss": "stopping.max_loss", "watched": "monitored", "apart": "disjoint",
    "least": "min_suspects"}
NTML = {name: f"pair.{name}" for name in
        ("nt_share", "center", "head_steps", "head_lr", "ml_share", "temperature", "clean_batch")}
TUNING = {name: f"tuning.{name}" for name in ("epochs", "lr_share", "batch_size")}
UNUSED = None  # a switch of a way that was not taken; the way is a class of its own now
FIELDS = {
    "dup": DUP, "lora": DUP, "ntml": NTML,
    "ft": TUNING | dict.fromkeys(("attention", "max_drop", "rho"), UNUSED),
    "fp": TUNING | dict.fromkeys(("attention", "rho"), UNUSED),
    "nad": TUNING | {"attention": "weight"} | dict.fromkeys(("max_drop", "rho"), UNUSED),
    "ft_sam": TUNING | dict.fromkeys(("attention", "max_drop"), UNUSED),
    "ibau": {"climbs": "ascent_steps", "climb_lr": "ascent_lr"}, "strip": {}, "onion": {}}


def numbers(value: object) -> Iterator[str]:
    """Yield the numbers, truth values and missing values of a record, each as a text."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif not isinstance(value, str):
        yield repr(value)


def digest(record: dict) -> str:
    """Return a digest of a record's numbers, for names that may change.

    What was measured counts in its order; of the hyperparameters only the values count, since
    they are nested otherwise now, and those of a defense's unused switches (0) do not.
    """
    settings = record["settings"]
    measured = {name: record[name] for name in ("metrics", "seconds", "seed")}
    used = [x for x in numbers(settings) if x not in ("0", "0.0", "False", "None")]
    parts = [*numbers(measured), *numbers(record.get("history", [])), *sorted(used)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def run_name(name: str) -> str:
    """Return the name of a run, ATTACK[-MODE]-rateR-seedS[-DEFENSE], in the field's words."""
    found = re.fullmatch(r"(.+?)(-clean|-mixed)?(-rate[\d.]+-seed\d+)(?:-(.+))?", name)
    if not found:
        return FILES.get(name, name)
    attack, mode, middle, defense = found.groups()
    parts = ATTACKS.get(attack, attack) + (mode or "") + middle
    return parts + (f"-{DEFENSES.get(defense, defense)}" if defense else "")


def nested(defense: str, flat: dict) -> dict:
    """Return the hyperparameters of a defense as its class composes them now."""
    known = next((fields for name, fields in FIELDS.items()
                  if re.fullmatch(rf"{name}(-.*)?", defense)), BEDKD)
    found: dict = {}
    for name, value in flat.items():
        place = known.get(name, name)
        if place is UNUSED:
            if value:
                raise ValueError(f"{defense} has {name} = {value!r}, which would be lost")
            continue
        room = found
        *above, last = place.split(".")
        for step in above:
            room = room.setdefault(step, {})
        room[last] = value
    return found


def migrated(record: dict) -> dict:
    """Return a record in the field's words."""
    settings = {SETTINGS.get(name, name): value for name, value in record["settings"].items()}
    if "defense" in settings:
        settings["defense"] = DEFENSES.get(settings["defense"], settings["defense"])
    if "defense_settings" in settings:
        settings["defense_settings"] = nested(settings["defense"], settings["defense_settings"])
    if settings.get("trigger"):
        names = re.compile("|".join(CLASSES))
        trigger = names.sub(lambda m: CLASSES[m[0]], settings["trigger"])
        settings["trigger"] = re.sub(r"name='(\w+)'",
                                     lambda m: f"name='{ATTACKS.get(m[1], m[1])}'", trigger)
        settings["trigger"] = settings["trigger"].replace("GeneratorConfig(rows=", (
            "GeneratorConfig(samples=")).replace("shape_epochs=", "mask_epochs=")
    study, name = STUDIES.get(record["study"], record["study"]), run_name(record["name"])
    command = re.sub(r"(sweep) \S+ --only \S+", rf"\1 {study} --only {name}", record["command"])
    command = command.replace("defenses.py pictures", "defenses.py images").replace(
        "tests/benchmark_", "benchmarks/")
    if "attack" in settings:
        settings["attack"] = ATTACKS.get(settings["attack"], settings["attack"])
    metrics = {}
    for metric, value in record["metrics"].items():
        base = metric.removesuffix("_reading")
        renamed = DEFENSES.get(base, base) + metric[len(base):]
        metrics[METRICS.get(metric, renamed)] = value
    return record | {"study": study, "name": name, "command": command, "settings": settings,
                     "method": ATTACKS.get(record["method"], record["method"]),
                     "metrics": metrics}


def main(folder: Path) -> None:
    """Migrate all records below a folder."""
    digests = {}
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf8"))
        made = migrated(record)
        digests[f"{made['study']}/{made['name']}"] = digest(record)
        new = folder / made["study"] / f"{made['name']}.json"
        new.parent.mkdir(exist_ok=True)
        path.unlink()
        new.write_text(json.dumps(made, indent=1) + "\n", encoding="utf8")
    for place in folder.iterdir():
        if not any(place.iterdir()):
            place.rmdir()
    kept = folder.parent / "numbers.json"
    kept.write_text(json.dumps(dict(sorted(digests.items())), indent=0) + "\n", encoding="utf8")
    print(f"{len(digests)} records")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
