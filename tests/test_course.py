"""The exercise sheets: built by nbgrader, and graded by nbgrader."""

import json
import re

import pytest

from tools import book, course

TASKS = {path.stem: course.read(path)[1] for path in sorted(course.SHEETS.glob("*.yml"))}
TESTED = {name: [t for t in tasks if t.tested] for name, tasks in TASKS.items()}
# Grading takes some seconds a sheet. These need the lightest imports.
SOME = ("01_five_minutes", "02_measuring", "08_dup")

pytestmark = [pytest.mark.slow,
              pytest.mark.filterwarnings("ignore:Object of type")]  # nbgrader's own queries


def notebook(folder, kind, name):
    return json.loads((folder / kind / name / f"{name}.ipynb").read_text(encoding="utf8"))


def kinds_of(task):
    """Return the names of a task's tests in nbgrader: of its own, or the chapter's check."""
    return ("check",) if task.checked else ("visible", "hidden")


def cells_of(stored):
    """Return the sources of a sheet by nbgrader's names."""
    return {c["metadata"]["nbgrader"]["grade_id"]: "".join(c["source"]) for c in stored["cells"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("course")
    assert course.build(made) == list(TASKS)
    return made


def graded(folder, student, answers, names):
    """Hand in answers, by nbgrader's names of the cells, and let nbgrader grade them.

    Returns: points and the highest points of each test; answers in words have None.
    """
    from nbgrader.api import Gradebook

    run, found = course.grader(folder), {}
    for name in names:
        stored = notebook(folder, "release", name)
        for cell in stored["cells"]:
            about = cell["metadata"]["nbgrader"]
            if about["solution"]:
                cell["source"] = answers.get(about["grade_id"], cell["source"])
        target = folder / "submitted" / student / name / f"{name}.ipynb"
        target.parent.mkdir(parents=True)
        target.write_text(json.dumps(stored), encoding="utf8")
        result = run.autograde(name, student)
        assert result["success"], result
        with Gradebook(f"sqlite:///{folder}/gradebook.db", "backdoors") as grades:
            found |= {g.name: (None if g.needs_manual_grade else g.auto_score, g.max_score)
                      for g in grades.find_submission_notebook(name, name, student).grades}
    return found


def test_the_course_covers_enough():
    assert len(TESTED) >= 8 and sum(map(len, TESTED.values())) >= 10


def test_whatever_a_chapter_checks_is_on_its_sheet():
    for path in book.notebooks():
        checked = {e.label for e in book.exercises(path) if e.check}
        assert checked <= {task.exercise for task in TASKS[path.stem]}, path.stem


def test_the_plan_of_the_guide_counts_what_it_sets():
    """Its exercises are on sheets, its ticks are checks, its minutes are sums."""
    guide = course.GUIDE.read_text(encoding="utf8")
    made = {e.label: e for path in book.notebooks() for e in book.exercises(path)}
    sheets = {task.exercise for tasks in TASKS.values() for task in tasks}
    plan = re.search(r"^## Six weeks\n.*?(?=^## )", guide, re.MULTILINE | re.DOTALL)[0]
    homework = [line.split("|")[5] for line in plan.splitlines() if re.match(r"\| \d", line)]
    assert len(homework) == 6
    for text in homework:
        labels = re.findall(r"\{numref\}`(ex-[\w-]+)`( ✓)?", text)
        assert sum(made[label].minutes for label, _ in labels) == int(
            re.search(r": (\d+) min", text)[1]), text
    for label, tick in re.findall(r"\{numref\}`(ex-[\w-]+)`( ✓)?", plan):
        assert label in sheets and bool(tick) == bool(made[label].check), label


def test_the_sheets_of_the_plan_are_the_plan():
    wanted, found = course.planned(), []
    assert len(wanted) == 21
    for path in sorted(course.SHEETS.glob("*.yml")):
        if made := course.sheet(path, wanted):
            found += [cell["id"].removesuffix("-text") for cell in made["cells"]
                      if cell["id"].endswith("-text")]
    assert sorted(found) == sorted(wanted)
    full = course.sheet(course.SHEETS / "10_baselines.yml")
    headings = [cell["source"].split("\n")[0] for cell in full["cells"]
                if cell["id"].endswith("-text")]
    assert headings == sorted(headings) and len(headings) > 3


def test_students_get_no_solution_and_no_hidden_test(folder):
    for name, tasks in TASKS.items():
        source, release = (cells_of(notebook(folder, kind, name))
                           for kind in ("source", "release"))
        seen = "\n".join(release.values())
        assert set(source) == set(release) and "BEGIN" not in seen and "{eq}" not in seen
        for task in tasks:
            answer = release[task.exercise]
            if task.checked:
                made = {e.label: e for e in book.exercises(book.CHAPTERS / f"{name}.ipynb")}
                assert answer.strip() == made[task.exercise].stub
                assert release[f"{task.exercise}-check"].strip() == made[task.exercise].check
                assert "strict=True)" in source[f"{task.exercise}-check"]
            elif task.tested:
                assert answer.strip() == task.stub.strip()
                assert release[f"{task.exercise}-hidden"] == course.MORE
                assert task.hidden.strip() in source[f"{task.exercise}-hidden"]
                assert task.visible.strip() == release[f"{task.exercise}-visible"]
                messages = re.findall(r'"[^"]{12,}"', task.hidden)
                assert messages and not any(text in seen for text in messages)
            else:
                assert answer == "YOUR ANSWER HERE"
            assert source[task.exercise] != answer
        assert not re.search(r"^:::|\{\w+\}`", seen, re.MULTILINE)


def test_reference_solutions_get_all_points(folder):
    answers = {label: text for name in TASKS
               for label, text in cells_of(notebook(folder, "source", name)).items()}
    wanted = {}
    for task in (task for tasks in TASKS.values() for task in tasks):
        if task.tested:
            wanted |= {f"{task.exercise}-{kind}": (most, most)
                       for kind, most in zip(kinds_of(task), task.points)}
        else:  # a person grades it
            wanted[task.exercise] = (None, task.points[0])
    assert graded(folder, "reference", answers, TASKS) == wanted


@pytest.mark.parametrize("student", ["mistaken", "idle"])
def test_wrong_and_missing_answers_get_less(folder, student):
    tasks = [task for name in SOME for task in TESTED[name]]
    answers = {task.exercise: task.wrong for task in tasks} if student == "mistaken" else {}
    found = graded(folder, student, answers, SOME)
    assert len(tasks) >= 5
    for task in tasks:
        got = [found[f"{task.exercise}-{kind}"][0] for kind in kinds_of(task)]
        assert sum(got) < sum(task.points), task.exercise
        assert student == "mistaken" or sum(got) == 0, task.exercise


@pytest.mark.parametrize("name", TESTED)
def test_every_test_can_fail(folder, name):
    """The tests of all sheets, in this process: a kernel for each would take minutes."""
    source = cells_of(notebook(folder, "source", name))
    release = cells_of(notebook(folder, "release", name))
    start = dict.fromkeys(label for label in source if label == "setup-sheet")
    for task in TESTED[name]:
        setup = [*start, *(x for x in source if x.startswith(f"{task.exercise}-setup-"))]
        kinds = kinds_of(task)
        for answer, most in ((task.wrong, len(kinds) - 1), (release[task.exercise], 0)):
            space = {"__name__": "sheet"}
            for label in setup:
                exec(source[label], space)
            exec(answer, space)
            passed = 0
            for kind in kinds:
                try:
                    exec(source[f"{task.exercise}-{kind}"], space)
                    passed += 1
                except Exception as error:  # what a student would see
                    rejected = error
            assert passed <= most, task.exercise
            if answer is task.wrong:
                assert isinstance(rejected, AssertionError) and len(str(rejected)) > 20, \
                    f"{task.exercise}: {rejected!r} helps nobody"


GOOD = """
tasks:
  - exercise: ex-dup-half
    cells: [c07-093]
    stub: limit = None
    points: [1, 1]
    visible: assert limit
    hidden: assert limit < 1
    wrong: limit = 2
"""


@pytest.mark.parametrize(("old", "new", "message"), [
    ("tasks:", "tasks: [", "07_anomalies.yml is not YAML"),
    ("tasks:", "task:", "must have `tasks`"),
    ("ex-dup-half", "ex-dup-none", "ex-dup-none: no such exercise in 07_anomalies.ipynb"),
    ("- exercise: ex-dup-half", "- label: ex-dup-half", "a task without `exercise`: unknown"),
    ("hidden: assert limit < 1", "", "ex-dup-half: missing \\['hidden'\\]"),
    ("visible: assert limit", "visible: ''", "ex-dup-half: missing \\['visible'\\]"),
    ("wrong: limit = 2", "wrong:", "ex-dup-half: missing \\['wrong'\\]"),
    ("[1, 1]", "3", "`points` must be"),
    ("[1, 1]", "[1, 0]", "`points` must be"),
    ("c07-093", "c99-001", "no code cell \\['c99-001'\\]"),
    ("ex-dup-half", "ex-dup-scale", "its solution has no code"),
    (GOOD, "tasks: [{exercise: ex-dup-half, points: 2}]", "so it needs `stub` and tests"),
    (GOOD, "tasks: [{exercise: ex-dup-half, points: 2, wrong: limit = 2}]",
     "the chapter has no stub with a check"),
    (GOOD, "tasks: [ex-dup-half]", "'ex-dup-half' has none"),
    (GOOD, "- a list", "must have `tasks`")])
def test_a_bad_sheet_is_named(tmp_path, old, new, message):
    path = tmp_path / "07_anomalies.yml"
    path.write_text(GOOD, encoding="utf8")
    assert len(course.sheet(path)["cells"]) == 7
    path.write_text(GOOD.replace(old, new), encoding="utf8")
    with pytest.raises(course.SheetError, match=message):
        course.sheet(path)


def test_a_sheet_does_not_repeat_the_stub_of_a_chapter(tmp_path):
    path = tmp_path / "01_five_minutes.yml"
    text = GOOD.replace("ex-dup-half", "ex-poison").replace("[c07-093]", "[c01-003]")
    path.write_text(text, encoding="utf8")
    with pytest.raises(course.SheetError, match="ex-poison: the chapter has stub and check"):
        course.sheet(path)


def test_an_exercise_without_solution_is_named(tmp_path, monkeypatch):
    path = tmp_path / "07_anomalies.yml"
    path.write_text(GOOD, encoding="utf8")
    unsolved = book.Exercise("ex-dup-half", 1, "easy", 5, False, "Why?", "", "")
    monkeypatch.setattr(book, "exercises", lambda chapter: [unsolved])
    with pytest.raises(course.SheetError, match="07_anomalies.yml, ex-dup-half: it has no solu"):
        course.sheet(path)


def test_a_sheet_needs_its_chapter(tmp_path):
    path = tmp_path / "77_nothing.yml"
    path.write_text(GOOD, encoding="utf8")
    with pytest.raises(course.SheetError, match="there is no chapter 77_nothing.ipynb"):
        course.sheet(path)


def test_what_nbgrader_rejects_is_named(tmp_path):
    (tmp_path / "sheets").mkdir()
    path = tmp_path / "sheets" / "07_anomalies.yml"
    path.write_text(GOOD.replace("limit = None", "'# BEGIN SOLUTION'"), encoding="utf8")
    with pytest.raises(course.SheetError, match="nbgrader rejects 07_anomalies"):
        course.build(tmp_path / "made", tmp_path / "sheets")


def test_exercises_are_taken_from_a_chapter(tmp_path):
    def text(source):
        return {"cell_type": "markdown", "source": [source]}

    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": [
        text(":::{exercise-start}\n:label: ex-a\n:::\n*Easy, 5 minutes, code.* Do.\n"
             ":::{exercise-end}\n:::\n\n:::{solution-start} ex-a\n:class: dropdown\n:::"),
        {"cell_type": "code", "source": ["a = 1"]}, {"cell_type": "code", "source": ["b = 2"]},
        text("Because.\n\n:::{solution-end}\n:::"),
        text(":::{exercise}\n:label: ex-b\n\n*Hard, 9 minutes.* Why?\n:::\n\n"
             ":::{solution} ex-b\n\nSo.\n:::\n"),
        text(":::{exercise}\n:label: ex-c\n*Easy, 1 minutes.* Open.\n:::")]}), encoding="utf8")
    first, second, third = book.exercises(path)
    assert first == book.Exercise("ex-a", 1, "easy", 5, True, "*Easy, 5 minutes, code.* Do.\n",
                                  "Because.", "a = 1\n\n\nb = 2")
    assert second == book.Exercise("ex-b", 2, "hard", 9, False, "\n*Hard, 9 minutes.* Why?\n",
                                   "So.", "")
    assert (third.place, third.words, third.program) == (3, "", "")


@pytest.mark.parametrize(("text", "wanted"), [
    ("by {eq}`eq-asr`", r"by \[equation eq-asr\]\(http.*/02_measuring.html#equation-eq-asr\)"),
    ("{ref}`chapter 6 <ch-bedkd>`", r"\[chapter 6\]\(http.*/06_bedkd.html#ch-bedkd\)"),
    ("{doc}`../how_to_use`", r"\[how_to_use\]\(http.*/chapters/how_to_use.html\)"),
    ("{cite:p}`gao2019strip`, {cite:t}`li2021nad`", r"\(Gao 2019\), Li 2021"),
    ("$$\nx\n$$ (eq-x)", r"\$\$\nx\n\$\$")])
def test_markup_of_the_book_becomes_plain(text, wanted):
    assert re.fullmatch(wanted, course.plain(text), re.DOTALL)


@pytest.mark.parametrize(("text", "message"), [
    ("{abbr}`ASR`", "no plain form"), (":::{note}\nx\n:::", "no plain form"),
    ("{eq}`eq-nowhere`", "no chapter defines eq-nowhere")])
def test_markup_without_a_plain_form_is_named(text, message):
    with pytest.raises(course.SheetError, match=message):
        course.plain(text)
