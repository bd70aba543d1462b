"""The list of processors: what is logged of a page, the table, and the rule of the margins."""

import ast
import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tools import assertions, comparisons, margins, processors, reports

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = "chapters/01.ipynb"


@pytest.fixture
def logged_run(tmp_path, monkeypatch):
    """Run a cell as a kernel that logs does; returns its names and the lines of the log."""
    log = tmp_path / "log.jsonl"

    def run(source, **names):
        wrapper = comparisons.Wrapper([])
        wrapper.cell = comparisons.fingerprint(source)
        tree = ast.fix_missing_locations(wrapper.visit(ast.parse(source)))
        monkeypatch.setattr(builtins, comparisons.CALLED, comparisons.comparer(wrapper.sites, log),
                            raising=False)
        log.write_text("")
        exec(compile(tree, "cell", "exec"), names)
        return names, [json.loads(line) for line in log.read_text().splitlines()]

    return run


def counted():
    """A function that notes with what it was called and gives it back."""
    calls = []
    return calls, lambda value: calls.append(value) or value


def test_both_sides_are_logged_and_evaluated_once(logged_run, capsys):
    calls, once = counted()
    _, lines = logged_run("print('few', once(0.25) < once(0.5))", once=once)
    assert capsys.readouterr().out == "few True\n" and calls == [0.25, 0.5]
    assert len(lines) == 1 and lines[0].pop("cell")
    assert lines[0] == {"label": "few", "expr": "once(0.25) < once(0.5)", "place": 0, "op": "<",
                        "limit": None, "slack": [-0.25, -0.25], "left": 0.25, "right": 0.5}


@pytest.mark.parametrize(("source", "value", "called", "logged"), [
    ("1 < 2 < 3", True, [1, 2, 3], ["<", "<"]),
    ("1 < 0 < 3", False, [1, 0], ["<"]),
    ("1 <= 1 == 1 > 4", False, [1, 1, 1, 4], ["<=", ">"]),
    ("1 == 2 < 3", False, [1, 2], []),
    ("1 == 1", True, [1, 1], []),
])
def test_a_chain_means_what_it_meant(logged_run, source, value, called, logged):
    calls, once = counted()
    text = " ".join(f"once({word})" if word.isdigit() else word for word in source.split())
    names, lines = logged_run(f"check = lambda value: value\nresult = check({text})", once=once)
    assert (names["result"], calls, [line["op"] for line in lines]) == (value, called, logged)


@pytest.mark.parametrize("values", [
    np.array([0.1, 0.9]), torch.tensor([0.1, 0.9], requires_grad=True), pd.Series([0.1, 0.9])])
def test_arrays_give_the_same_and_log_their_extremes(logged_run, values):
    source = "check = lambda text, value: value\nresult = check('all', values > 0.5)"
    names, (line,) = logged_run(source, values=values)
    assert type(names["result"]) is type(values > 0.5)
    assert names["result"].tolist() == [False, True]
    assert line["limit"] == 0.5 and line["slack"] == pytest.approx([-0.4, 0.4])


def test_what_is_found_and_what_is_left_alone(logged_run):
    source = """
def inner():
    assert 1 < 2
    return max(3 > 2, key=lambda x: x) if False else 5
class Inner:
    assert 1 < 2
f = lambda: print(1 < 2)
x = 1 < 2
checks = {"named": 3 > 2}
assert inner() >= 5, f"label {x}"
print(f"{4 < 5}", end="")
print(all(y > 0 for y in (1, 2)), end="")
print((1 < 2) < 3, "a" < "b", [1] < [2], {1} < {1, 2}, end="")
inner(), f()
"""
    _, lines = logged_run(source)
    assert [(line["label"], line["expr"]) for line in lines] == [
        ("named", "3 > 2"), ("label {x}", "inner() >= 5"), ("print", "4 < 5"),
        ("print", "y > 0"), ("print", "y > 0"), ("print", "(1 < 2) < 3")]


def test_an_error_is_the_one_of_the_comparison(logged_run):
    with pytest.raises(TypeError, match="'<' not supported"):
        logged_run("print(1 < 'a')")
    with pytest.raises(ValueError, match="ambiguous"):
        logged_run("print(values < values < values)", values=np.arange(2))


def book(root, source="print(x > 0.5)"):
    """A book of one cell; returns its fingerprint."""
    (root / "chapters").mkdir()
    (root / "data").mkdir()
    cell = {"cell_type": "code", "id": "c01-001", "source": [source]}
    (root / CHAPTER).write_text(json.dumps({"cells": [cell]}))
    return comparisons.fingerprint(source)


def logs(folder, cell, *slacks):
    folder.mkdir()
    for place, slack in enumerate(slacks):
        line = {"cell": cell, "label": "it works", "expr": "x > 0.5", "place": 0, "op": ">",
                "limit": 0.5, "slack": [slack, slack]}
        (folder / f"margins-{place}-1.jsonl").write_text(json.dumps(line) + "\n")
    return folder


@pytest.mark.parametrize(("slacks", "status", "moving"), [
    ((0.3, 0.3), 0, 0),  # no processor changes it
    ((0.0, 0.0), 0, 0),
    ((0.3, 0.4, 0.35), 0, 1),  # three spreads away
    ((0.15, 0.25), 1, 1),  # one and a half
    ((-0.15, -0.25), 1, 1),
    ((-0.01, 0.3), 1, 1),  # the verdict changes
])
def test_a_margin_of_less_than_two_spreads_fails(tmp_path, capsys, slacks, status, moving):
    folder = logs(tmp_path / "one", book(tmp_path), *slacks)
    assert margins.main([folder], [], tmp_path) == status
    record = json.loads((tmp_path / margins.RECORD).read_text())["comparisons"]
    assert len(record) == moving
    if moving:
        assert record[0]["chapter"] == "01" and record[0]["cell"] == "c01-001"
        assert record[0]["lowest"] == pytest.approx(0.5 + min(slacks))
    assert ("it works" in capsys.readouterr().out) == bool(status)


def test_two_machines_are_laid_side_by_side_and_old_cells_are_left_out(tmp_path, capsys):
    cell = book(tmp_path)
    one, two = (logs(tmp_path / name, cell, slack) for name, slack in (("a", .3), ("b", .1)))
    old = logs(tmp_path / "c", "0" * 12, 0.01)
    assert margins.main([one, old], [], tmp_path) == 0
    assert margins.main([one, two, old], [], tmp_path) == 1


def test_an_array_is_judged_at_both_ends():
    line = {"op": ">", "limit": None}
    assert margins._entry([0.3, 0.31], line)["ratio"] == pytest.approx(30)
    assert margins._entry([0.3, -0.31], line)["ratio"] == 0


def test_the_kernel_logs_and_shows_the_same(tmp_path, monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    monkeypatch.setenv(comparisons.LOG, str(tmp_path / "log"))
    monkeypatch.setattr(builtins, comparisons.CALLED, None, raising=False)
    comparisons.install(shell)
    result = shell.run_cell("assert 2 > 1\n2 > 1")
    assert result.success and result.result is True
    line = json.loads((tmp_path / "log").read_text())
    assert line["cell"] == comparisons.fingerprint("assert 2 > 1\n2 > 1")
    startup = margins.profile(tmp_path / "home") / "profile_default" / "startup"
    assert "tools.comparisons.install" in (startup / "00-margins.py").read_text()


REPORT = """<testsuites><testsuite time="90">
<testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/></testcase>
<testcase classname="a" name="left out"><skipped/></testcase></testsuite></testsuites>"""


def test_a_report_is_counted_and_one_that_is_missing_fails(tmp_path):
    path = tmp_path / "report.xml"
    assert reports.read_report(path, 124)["failed"] == ["pytest ended with status 124"]
    path.write_text(REPORT)
    assert reports.read_report(path, 1) == {"passed": 1, "skipped": 1, "failed": ["a::bad"],
                                               "minutes": 1.5}


def test_the_table_adds_up_what_belongs_together(tmp_path):
    for step, setting, passed, failed in (("tests", "avx2", 5, ["a"]), ("alone", "avx2", 2, []),
                                          ("chapters", "native", 9, [])):
        record = {"step": step, "setting": setting, "threads": 1, "cpu": "some",
                  "passed": passed, "failed": failed, "minutes": 1.5}
        (tmp_path / f"{step}-{setting}-1.json").write_text(json.dumps(record))
    found = reports.records([tmp_path], list(processors.SETTINGS))
    assert reports.table(found).splitlines()[2:] == [
        "| some | native | 1 | – | 9/0 | 1.5 |", "| some | avx2 | 1 | 7/1 | – | 3.0 |"]


def test_a_setting_hides_the_others_and_shares_only_the_assets(cache, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    folder = processors.own_cache("avx2", 2)
    assert (folder / "assets").resolve() == (cache / "assets").resolve()
    assert folder != processors.own_cache("avx2", 1) != processors.own_cache("native", 1)
    variables = processors.environment("avx2", 2, folder)
    assert variables["OMP_NUM_THREADS"] == "2" and variables["ATEN_CPU_CAPABILITY"] == "avx2"
    assert "MKL_CBWR" not in variables and variables["BDUTILS_CACHE"] == str(folder)
    assert len(processors.SETTINGS) >= 5


def test_what_runs_alone_finds_the_models_of_the_chapters(monkeypatch, tmp_path):
    done = []

    def run(step, setting, threads, options):
        done.append((setting, threads, step))
        return {"step": step, "setting": setting, "threads": threads, "cpu": "some", "passed": 1,
                "failed": [], "minutes": 1}

    monkeypatch.setattr(processors, "run", run)
    arguments = ["run", "alone", "chapters", "--settings", "avx2", "--threads", "2", "1"]
    assert processors.main([*arguments, "--out", str(tmp_path)]) == 0
    assert done == [("avx2", 2, "chapters"), ("avx2", 2, "alone"),
                    ("avx2", 1, "chapters"), ("avx2", 1, "alone")]


# ------------------------------------------------------------- assertions of tests


def asserted(folder, name, *values):
    """Write a log as the plugin does, of one assertion that is passed several times."""
    log = folder / f"assertions-{name}.jsonl"
    item = SimpleNamespace(nodeid="tests/test_x.py::test_y")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(assertions.LOG, str(log))
        for value in values:
            assertions.pytest_assertion_pass(item, 7, "rate < 0.5", f"{value} < 0.5\n  + where")
        assertions.pytest_assertion_pass(item, 8, "a == b", "1.25 == 1.25")
    return log


def test_assertions_that_come_too_close_are_named(tmp_path, capsys):
    logs = [asserted(tmp_path, "one", 0.1, 0.2), asserted(tmp_path, "two", 0.2, 0.2)]
    first, = assertions.moving(logs)  # the second time nothing moved
    assert first["lowest"] == pytest.approx(-0.4) and first["ratio"] == pytest.approx(3)
    assert assertions.report(logs, 2.0) == 0
    logs = [asserted(tmp_path, "three", 0.1), asserted(tmp_path, "four", 0.45)]
    assert assertions.report(logs, 2.0) == 1
    assert "tests/test_x.py::test_y:7: rate < 0.5" in capsys.readouterr().out


@pytest.mark.slow
def test_the_plugin_sees_what_a_real_test_compares(tmp_path):
    """But not what an installed package compares, such as a plugin of pytest."""
    package = tmp_path / "site-packages"
    package.mkdir()
    (package / "installed.py").write_text("def call():\n    assert 0.5 < 1\n")
    (tmp_path / "conftest.py").write_text(
        f"import sys, pytest\nsys.path.append({str(package)!r})\n"
        "pytest.register_assert_rewrite('installed')\n")
    (tmp_path / "test_it.py").write_text(
        "import installed\ndef test_it():\n    installed.call()\n"
        "    assert 0.25 < 1 and 3 >= 2.5\n")
    log = tmp_path / "log"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tools.assertions", "-p", "no:cacheprovider",
         "-o", "enable_assertion_pass_hook=true", "-c", os.devnull, "--rootdir", str(tmp_path),
         str(tmp_path)], cwd=ROOT, env={**os.environ, assertions.LOG: str(log)},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    line, = map(json.loads, log.read_text().splitlines())
    assert line["pairs"] == [[0.25, 1.0], [3.0, 2.5]]


@pytest.mark.parametrize("shown, wanted", [
    ("0.25 < (0.1 * 5)", [(0.25, 0.5)]), ("(0.5 / 2) >= -np.float64(1e-3)", []),
    ("np.float64(0.25) > tensor(0.5)", [(0.25, 0.5)]), ("len([1, 2]) < 3", []),
    ("(0.5 < 1 and 'a' < 'b')", [(0.5, 1.0)]), ("<object at 0x1> < 2", [])])
def test_the_numbers_of_an_explanation(shown, wanted):
    assert assertions.pairs(shown) == wanted
