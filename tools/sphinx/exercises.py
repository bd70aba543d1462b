"""A table of all exercises, made by the build from the chapters and the sheets.

It is placed by `:::{exercise-table}`.
"""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tools import book, course


def points_of(name: str) -> dict[str, float]:
    """Return the points of each exercise that is on the sheet of a chapter.

    Args:
        name: Of the chapter.
    """
    path = course.SHEETS / f"{name}.yml"
    return {t.exercise: sum(t.points) for t in course.read(path)[1]} if path.is_file() else {}


def lines_of(path: Path) -> list[tuple[str, ...]]:
    """Return label, difficulty, minutes, form of the answer and points, an exercise a line.

    Args:
        path: Of the chapter.
    """
    points = points_of(path.stem)
    return [(e.label, e.difficulty, str(e.minutes),
             "code, checked" if e.check else "code" if e.code else "words",
             f"{points[e.label]:g}" if e.label in points else "")
            for e in book.exercises(path)]


class ExerciseTable(SphinxDirective):
    """One line an exercise: chapter, place, how hard, how long, how it is answered, points."""

    def run(self) -> list[nodes.Node]:
        """Return the table, and below it the points of each sheet."""
        lines = ["| chapter | exercise | difficulty | minutes | answer | points |",
                 "| --- | --- | --- | ---: | --- | ---: |"]
        sums = []
        for path in book.notebooks():
            for source in (path, course.SHEETS / f"{path.stem}.yml"):
                self.env.note_dependency(str(source))
            where = path.relative_to(Path(self.env.srcdir)).with_suffix("")
            lines += [f"| {{doc}}`/{where}` | {{numref}}`{label}` | {' | '.join(rest)} |"
                      for label, *rest in lines_of(path)]
            sums.append(f"{int(path.stem[:2])}: {sum(points_of(path.stem).values()):g}")
        return self.parse_text_to_nodes(
            "\n".join([*lines, "", f"Points of the sheets, by chapter: {', '.join(sums)}."]))


def setup(app: Sphinx) -> dict:
    """Make the directive known."""
    app.add_directive("exercise-table", ExerciseTable)
    return {"parallel_read_safe": True}
