"""The recorded results kept every number when their words changed.

`data/numbers.json` holds digests that were taken before that change; a run that was made anew
since then is no longer among them.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from bdutils.experiments import results
from bdutils.experiments.studies import STUDIES
from bdutils.experiments.variants import VARIANTS

BEFORE = json.loads((results.FOLDER.parent / "numbers.json").read_text())
RECORDS = sorted(results.FOLDER.glob("*/*.json"))
# Hyperparameters of earlier forms of DUP and BeDKD, which runs not made anew still have.
RETIRED = {".unlearning.gate", ".stopping.average", ".scan.fpr"}


def numbers(value: object) -> Iterator[str]:
    """Yield the numbers, truth values and missing values of a record, each as a text."""
    if isinstance(value, dict):
        for item in value.values():
            yield from numbers(item)
    elif isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif value == "inf":  # JSON has no number for it
        yield value
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


def leaves(value, path=""):
    """Return the places of all values that are no dictionary."""
    if not isinstance(value, dict):
        return {path}
    return set().union(*(leaves(item, f"{path}.{name}") for name, item in value.items()), set())


def test_no_record_was_lost():
    known = {f"{path.parent.name}/{path.stem}" for path in RECORDS}
    assert set(BEFORE) <= known and len(BEFORE) == 401


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_number_is_what_it_was(path):
    name = f"{path.parent.name}/{path.stem}"
    assert BEFORE.get(name) in (None, digest(results.read(path)))  # None: a later run


@pytest.mark.parametrize("change", [
    lambda r: r["metrics"]["cacc"].__setitem__("value", r["metrics"]["cacc"]["value"] + 1e-9),
    lambda r: r["metrics"].__setitem__("asr", r["metrics"].pop("asr") | {"n": 1}),
    lambda r: r["history"].pop(),
    lambda r: r["settings"]["defense_settings"]["detector"].__setitem__("layers", 4),
    lambda r: r["seconds"].__setitem__("search", 0.05),
    lambda r: r["metrics"].update(cacc=r["metrics"]["ra"], ra=r["metrics"]["cacc"])])
def test_a_changed_number_is_noticed(change):
    record = results.read(results.FOLDER / "dup" / "badnets-rate0.2-seed0-dup.json")
    was = digest(record)
    change(record)
    assert digest(record) != was


def test_hyperparameters_stand_where_their_class_has_them():
    for path in RECORDS:
        settings = results.read(path)["settings"]
        if "defense_settings" in settings:
            now = json.loads(json.dumps(asdict(VARIANTS[settings["defense"]])))
            assert leaves(settings["defense_settings"]) <= leaves(now) | RETIRED, path


def test_every_record_is_a_run_of_its_study():
    for study, runs in STUDIES.items():
        kept = {path.stem for path in RECORDS if path.parent.name == study}
        assert kept <= {run.name for run in runs}, study


def test_a_record_says_where_it_is():
    assert isinstance(results.FOLDER, Path)
    for path in RECORDS:
        record = results.read(path)
        script = re.match(r"python (benchmarks/\w+\.py)", record["command"])
        if script:
            assert (results.FOLDER.parent.parent / script[1]).is_file()
        elif record["study"] not in ("throughput", "cohorts"):
            assert f"{record['study']} --only {record['name']}" in record["command"]
