"""Exercise sheets for a class, in the form of nbgrader: `python -m tools.course FOLDER`.

An exercise's statement and solution stay in its chapter, and so do its stub and its check, if it
has them. A file of `chapters/teaching/sheets` adds what a sheet needs beside them: points, and a
wrong answer that must not get all of them; without a check in the chapter also set-up, a stub,
tests that students see and tests that they do not see. From both this makes one notebook a
chapter; nbgrader takes solutions and hidden tests out of it for the students.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import book

if TYPE_CHECKING:
    from nbgrader.apps import NbGraderAPI

SHEETS = book.CHAPTERS / "teaching" / "sheets"
GUIDE = book.CHAPTERS / "teaching" / "guide.md"
CONFIG = """\
# Made by `make course`, and read by every nbgrader command that is started in this folder.
c = get_config()
c.CourseDirectory.course_id = "backdoors"
# Each solution cell of a sheet begins with a stub of its own; nothing is to be put below it.
c.ClearSolutions.code_stub = {"python": ""}
# Seconds: a busy machine is slow to start a kernel, and the first cell loads PyTorch.
c.Execute.startup_timeout = c.Execute.timeout = 300
"""
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
HEAD = """\
# Exercises: {title}

The exercises belong to [chapter {number}]({page}). Each has a cell for your answer; keep the names
that stand in it, since the tests below it ask for them. Where a task with code also asks a
question, answer in a comment at the end of its cell. All other cells are put back to what they
are now before your work is graded. Before you hand in, choose *Kernel > Restart Kernel and Run All
Cells*: an answer that needs a deleted cell fails then, and not when it is graded."""
MORE = "# More tests stand here when the sheet is graded."


class SheetError(ValueError):
    """A sheet that cannot be built; the message names file, exercise and remedy."""


@dataclass(frozen=True)
class Task:
    """What a sheet's file says of one exercise."""

    exercise: str
    """Its label."""
    points: Sequence[float]
    """Of visible and hidden tests; one number for a check of the chapter, and for an answer in
    words, which a person grades."""
    cells: Sequence[str] = ()
    """Ids of the chapter's cells that are needed."""
    setup: str = ""
    """Code that comes after them."""
    stub: str = ""
    """What the student finds."""
    visible: str = ""
    """Tests that the student sees."""
    hidden: str = ""
    """Tests that the student does not see."""
    wrong: str = ""
    """An answer that must not get all points; it is in no notebook."""

    @property
    def tested(self) -> bool:
        """Tell whether tests grade it, and not a person."""
        return bool(self.wrong)

    @property
    def checked(self) -> bool:
        """Tell whether stub and check are the chapter's."""
        return self.tested and not self.stub


def read(path: Path) -> tuple[str, list[Task]]:
    """Return a sheet's common set-up and its tasks.

    Args:
        path: Of the YAML file, named like its chapter.

    Raises:
        SheetError: If it is not YAML, or a key is unknown or missing.
    """
    import yaml

    try:
        sheet = yaml.safe_load(path.read_text(encoding="utf8"))
    except yaml.YAMLError as error:
        raise SheetError(f"{path.name} is not YAML: {error}") from None
    if not isinstance(sheet, dict) or not sheet.get("tasks") or set(sheet) - {"setup", "tasks"}:
        raise SheetError(f"{path.name} must have `tasks`, a list, and may have `setup`, code; "
                         "nothing else")
    return sheet.get("setup", ""), [_task(path.name, entry) for entry in sheet["tasks"]]


def _task(name: str, entry: dict) -> Task:
    """Reject an entry that does not say what it must."""
    if not isinstance(entry, dict):
        raise SheetError(f"{name}: each task has keys, at least `exercise` and `points`; "
                         f"{entry!r} has none")
    entry = {key: value for key, value in entry.items() if value is not None and value != ""}
    where = f"{name}, {entry.get('exercise', 'a task without `exercise`')}"
    if unknown := set(entry) - set(Task.__dataclass_fields__):
        raise SheetError(f"{where}: unknown {sorted(unknown)}; known are "
                         f"{sorted(Task.__dataclass_fields__)}")
    tests = {"stub", "visible", "hidden", "wrong"}
    given = tests & set(entry)
    own = bool(given - {"wrong"})
    missing = {"exercise", "points"} - set(entry) | (tests - given if own else set())
    if missing:
        raise SheetError(f"{where}: missing {sorted(missing)}; a task with own tests has all of "
                         f"{sorted(tests)}, one with a check in the chapter has `wrong`, one in "
                         "words none of them")
    points = entry["points"] if isinstance(entry["points"], list) else [entry["points"]]
    if len(points) != 1 + own or not all(isinstance(p, int | float) and p > 0 for p in points):
        raise SheetError(f"{where}: `points` must be [for visible, for hidden tests] with own "
                         f"tests, one number without, all above 0; not {entry['points']!r}")
    return Task(**{**entry, "points": points})


KINDS = {"eq": "equation", "fig": "figure", "ex": "exercise", "alg": "algorithm",
         "ch": "chapter", "sec": "section"}


def plain(text: str) -> str:
    """Return Markdown without the directives and roles that only the book understands.

    Args:
        text: Of a chapter or page.

    Raises:
        SheetError: For a role that has no plain form here, or a directive.
    """
    text = re.sub(r"\{([a-z:]+)\}`([^`]+)`", lambda m: _role(m[1], m[2]), text)
    text = re.sub(r"\$\$ \(eq-[\w-]+\)", "$$", text)  # the label of a displayed equation
    if found := re.search(r"^(:{3,}|`{3,}\{)\S*", text, re.MULTILINE):
        raise SheetError(f"the directive {found[0]} has no plain form: write it in words")
    return text.strip()


def _role(role: str, content: str) -> str:
    words, label = re.fullmatch(r"(?:(.*) <)?(.*?)>?", content, re.DOTALL).groups()
    if role in ("cite:p", "cite:t"):  # keys are author, year, first word of the title
        names = [f"{author.capitalize()} {year}" for author, year in
                 re.findall(r"([a-z]+)(\d{4})", label)]
        return f"({'; '.join(names)})" if role == "cite:p" else "; ".join(names)
    if role == "term":
        return words or label
    if role == "doc":
        stem = label.rsplit("/", 1)[-1]
        return f"[{words or stem}]({book.page(stem)})"
    if role in ("eq", "ref", "numref", "prf:ref"):
        kind = KINDS.get(label.split("-")[0], "part")
        anchor = f"equation-{label}" if role == "eq" else label
        return f"[{words or f'{kind} {label}'}]({book.page(_home(label))}#{anchor})"
    raise SheetError(f"the role {{{role}}}`{content}` has no plain form: write it in words")


def _home(label: str) -> str:
    """Find the chapter in which something is defined."""
    made = re.compile(rf'\({label}\)|:(label|name): {label}\b|"name": "{label}"')
    for path in book.notebooks():
        if made.search(path.read_text(encoding="utf8")):
            return path.stem
    raise SheetError(f"no chapter defines {label}")


def planned() -> set[str]:
    """Return the labels of the exercises that the guide's six weeks set."""
    plan = re.search(r"^## Six weeks\n.*?(?=^## )", GUIDE.read_text(encoding="utf8"),
                     re.MULTILINE | re.DOTALL)[0]
    homework = [line.split("|")[5] for line in plan.splitlines() if re.match(r"\| \d", line)]
    return set(re.findall(r"\{numref\}`(ex-[\w-]+)`", "".join(homework)))


def sheet(path: Path, only: Set[str] | None = None) -> dict | None:
    """Return the notebook of a sheet, with solutions and hidden tests.

    Args:
        path: Of the YAML file.
        only: Labels of the exercises to take, None for all.

    Returns:
        A notebook in nbformat's form; its cells have nbgrader's metadata. None without exercises.

    Raises:
        SheetError: If file and chapter do not fit together.
    """
    chapter = book.CHAPTERS / f"{path.stem}.ipynb"
    if not chapter.is_file():
        raise SheetError(f"{path.name}: there is no chapter {chapter.name}; a sheet is named "
                         "like its chapter")
    setup, tasks = read(path)
    stored = json.loads(chapter.read_text(encoding="utf8"))["cells"]
    code = {c["id"]: "".join(c["source"]) for c in stored if c["cell_type"] == "code"}
    title = re.search(r"^# (.+)", "\n".join("".join(c["source"]) for c in stored), re.M)[1]
    number = int(path.stem[:2])
    head = HEAD.format(title=title, number=number, page=book.page(path.stem))
    cells = [_cell("head", head, "markdown"), _cell("setup", next(iter(code.values())))]
    exercises = {e.label: e for e in book.exercises(chapter)}
    if unknown := [task.exercise for task in tasks if task.exercise not in exercises]:
        raise SheetError(f"{path.name}, {unknown[0]}: no such exercise in {chapter.name}, which "
                         f"has {sorted(exercises)}")
    tasks = [task for task in tasks if only is None or task.exercise in only]
    if setup:
        cells.append(_cell("setup-sheet", setup))
    for task in sorted(tasks, key=lambda task: exercises[task.exercise].place):
        where = f"{path.name}, {task.exercise}"
        if unknown := set(task.cells) - set(code):
            raise SheetError(f"{where}: no code cell {sorted(unknown)} in {chapter.name}")
        needed = [re.sub(r"^#\| \w.*\n", "", code[i], flags=re.M) for i in task.cells]
        exercise = exercises[task.exercise]
        heading = f"## Exercise {number}.{exercise.place}\n\n{plain(exercise.statement)}"
        cells += [_cell(f"{task.exercise}-text", heading, "markdown"),
                  *_cells(where, task, exercise, [*needed, task.setup])]
    about = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    made = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return made if tasks else None


def _cells(where: str, task: Task, exercise: book.Exercise, setup: Sequence[str]) -> list[dict]:
    """Return the cells of one task, below its statement."""
    name = task.exercise
    if not exercise.program and not exercise.words:
        raise SheetError(f"{where}: it has no solution; write one in the chapter")
    if task.tested and not exercise.program:
        raise SheetError(f"{where}: its solution has no code, so tests cannot grade it; leave "
                         "`stub` and tests out")
    if exercise.program and not task.tested:
        raise SheetError(f"{where}: its solution has code, so it needs `stub` and tests, or "
                         "`wrong` where the chapter has a stub with a check")
    if task.tested and task.checked != bool(exercise.check):
        raise SheetError(f"{where}: " + (
            "the chapter has stub and check already; leave the sheet's out" if exercise.check else
            "the chapter has no stub with a check of `bdutils.exercises` below the exercise"))
    if task.checked:
        setup = [*setup, f"from bdutils.exercises import {exercise.check.split('(')[0]}"]
    start = [_cell(f"{name}-setup-{i}", part) for i, part in enumerate(setup) if part.strip()]
    if not task.tested:
        answer = f"### BEGIN SOLUTION\n{plain(exercise.words)}\n### END SOLUTION"
        return [*start, _cell(name, answer, "markdown", solution=True, points=task.points[0])]
    stub = exercise.stub if task.checked else task.stub
    answer = f"{stub.rstrip()}\n### BEGIN SOLUTION\n{exercise.program}\n### END SOLUTION"
    if task.checked:  # students see what it prints; only the graded form stops at a mistake
        strict = re.sub(r"\)$", ", strict=True)", exercise.check)
        test = f"{exercise.check}\n### BEGIN HIDDEN TESTS\n{strict}\n### END HIDDEN TESTS"
        return [*start, _cell(name, answer, solution=True),
                _cell(f"{name}-check", test, points=task.points[0])]
    # What the visible tests reject gets no hidden points either: a loop over nothing passes.
    hidden = (f"{MORE}\n### BEGIN HIDDEN TESTS\n{task.visible.rstrip()}\n\n"
              f"{task.hidden.rstrip()}\n### END HIDDEN TESTS")
    return [*start, _cell(name, answer, solution=True),
            _cell(f"{name}-visible", task.visible, points=task.points[0]),
            _cell(f"{name}-hidden", hidden, points=task.points[1])]


def _cell(name: str, source: str, kind: str = "code", solution: bool = False,
          points: float | None = None) -> dict:
    """Return a cell of the form that nbgrader reads; only solutions may be edited."""
    about = {"schema_version": 3, "grade_id": name, "solution": solution, "task": False,
             "locked": not solution, "grade": points is not None}
    if points is not None:
        about["points"] = points
    cell = {"cell_type": kind, "id": name, "metadata": {"nbgrader": about},
            "source": source.rstrip()}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def grader(folder: Path) -> NbGraderAPI:
    """Return nbgrader's interface to a course folder.

    Args:
        folder: Made by `build`.

    Source: nbgrader.
    """
    from nbgrader.apps import NbGraderAPI
    from traitlets.config.loader import PyFileConfigLoader

    # nbgrader starts `alembic` by its name, and the environment need not be an active one.
    commands = str(Path(sys.executable).parent)
    if commands not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((commands, os.environ["PATH"]))
    config = PyFileConfigLoader("nbgrader_config.py", path=str(folder)).load_config()
    config.CourseDirectory.root = str(folder)
    return NbGraderAPI(config=config)


def build(folder: Path, sheets: Path = SHEETS, only: Set[str] | None = None) -> list[str]:
    """Write all sheets into a course folder: `source` for teachers, `release` for students.

    Args:
        folder: Made if need be; submissions and grades in it stay.
        sheets: The YAML files.
        only: As for `sheet`; other sheets are not made.

    Returns:
        The names of the assignments.

    Raises:
        SheetError: For a sheet that cannot be built, or that nbgrader rejects.

    Source: nbgrader's `generate_assignment`.
    """
    made = {path.stem: notebook for path in sorted(sheets.glob("*.yml"))
            if (notebook := sheet(path, only))}
    folder = folder.resolve()
    for name, notebook in made.items():
        target = folder / "source" / name / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf8")
    (folder / "nbgrader_config.py").write_text(CONFIG, encoding="utf8")
    about = re.search(r"^## Exercise sheets\n.*?(?=^## )", GUIDE.read_text(encoding="utf8"),
                      re.MULTILINE | re.DOTALL)[0]
    (folder / "README.md").write_text(plain(about)[1:] + "\n", encoding="utf8")
    run = grader(folder)
    for name in made:
        result = run.generate_assignment(name)
        if not result["success"]:
            raise SheetError(f"nbgrader rejects {name}: {result.get('error') or result['log']}")
    return list(made)


def main(arguments: Sequence[str] | None = None) -> None:
    """Build the course into the folder that is named, or into `_build/course`."""
    parser = argparse.ArgumentParser("python -m tools.course", description="Make exercise sheets.")
    parser.add_argument("folder", nargs="?", type=Path, default=book.ROOT / "_build" / "course")
    parser.add_argument("--six-weeks", action="store_true",
                        help="only the exercises of the guide's plan of six weeks")
    given = parser.parse_args(arguments)
    names = build(given.folder, only=planned() if given.six_weeks else None)
    print(f"{len(names)} sheets are in {given.folder}: hand out `release`, and read README.md "
          "there")


if __name__ == "__main__":
    main()
