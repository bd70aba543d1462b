"""The recorded results kept every number when their words changed.

A run that was made anew since then is no longer among them.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest

from bdutils.experiments import results
from bdutils.experiments.studies import STUDIES
from bdutils.experiments.variants import VARIANTS
from tools.migrate_records import digest, nested, run_name

BEFORE = json.loads((results.FOLDER.parent / "numbers.json").read_text())
RECORDS = sorted(results.FOLDER.glob("*/*.json"))
# Hyperparameters of earlier forms of DUP and BeDKD, which runs not made anew still have.
RETIRED = {".unlearning.gate", ".stopping.average", ".scan.fpr"}


def leaves(value, path=""):
    """Return the places of all values that are no dictionary."""
    if not isinstance(value, dict):
        return {path}
    return set().union(*(leaves(item, f"{path}.{name}") for name, item in value.items()), set())


def test_no_record_was_lost():
    known = {f"{path.parent.name}/{path.stem}" for path in RECORDS}
    assert set(BEFORE) <= known and len(BEFORE) == 403


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


def test_a_switch_that_would_be_lost_is_told():
    with pytest.raises(ValueError, match="would be lost"):
        nested("nad", {"attention": 1000.0, "max_drop": 0.1})


@pytest.mark.parametrize(("old", "new"), [
    ("patch-rate0.1-seed0-tuning", "badnets-rate0.1-seed0-ft"),
    ("corners-clean-rate0.08-seed2-sam", "label_consistent-clean-rate0.08-seed2-ft_sam"),
    ("clean-rate0.0-seed1-bedkd-pictures", "clean-rate0.0-seed1-bedkd-images"),
    ("syntax-rate0.2-seed1", "synbkd-rate0.2-seed1")])
def test_names_of_runs(old, new):
    assert run_name(old) == new and not re.search("tuning|pruning", new)


def test_a_record_says_where_it_is():
    assert isinstance(results.FOLDER, Path)
    for path in RECORDS:
        record = results.read(path)
        script = re.match(r"python (benchmarks/\w+\.py)", record["command"])
        if script:
            assert (results.FOLDER.parent.parent / script[1]).is_file()
        elif record["study"] not in ("throughput", "cohorts"):
            assert f"{record['study']} --only {record['name']}" in record["command"]
