"""A table of all exercises, made by the build from the chapters: `:::{exercise-table}`."""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tools import book


class ExerciseTable(SphinxDirective):
    """One line an exercise: chapter, place, how hard, how long, whether code is written."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        lines = ["| chapter | exercise | difficulty | minutes | code |",
                 "| --- | --- | --- | ---: | --- |"]
        for path in book.notebooks():
            self.env.note_dependency(str(path))
            where = path.relative_to(Path(self.env.srcdir)).with_suffix("")
            lines += [f"| {{doc}}`/{where}` | {{numref}}`{e.label}` | {e.difficulty} "
                      f"| {e.minutes} | {'yes' if e.code else ''} |"
                      for e in book.exercises(path)]
        return self.parse_text_to_nodes("\n".join(lines))


def setup(app: Sphinx) -> dict:
    """Make the directive known."""
    app.add_directive("exercise-table", ExerciseTable)
    return {"parallel_read_safe": True}
