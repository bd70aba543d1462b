"""Links to the slides, if `make slides` was run before: `:::{decks}`. The site does without."""

import shutil
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from tools import book

SLIDES = Path(__file__).resolve().parents[2] / "_build" / "slides"


class Decks(SphinxDirective):
    """One line a chapter, or how to make the slides."""

    def run(self) -> list[nodes.Node]:
        """Return the list."""
        self.env.note_dependency(str(SLIDES / "index.html"))
        there = [path for path in book.notebooks() if (SLIDES / f"{path.stem}.html").is_file()]
        up = "../" * self.env.docname.count("/")
        lines = [f'- <a href="{up}slides/{path.stem}.html">Slides</a> of {{doc}}`/chapters/'
                 f"{path.stem}`" for path in there]
        return self.parse_text_to_nodes("\n".join(lines) or (
            "These pages were built without the slides: `make slides book` takes them along."))


def _copy(app: Sphinx, error: Exception | None) -> None:
    if not error and app.builder.format == "html" and SLIDES.is_dir():
        shutil.copytree(SLIDES, Path(app.outdir) / "slides", dirs_exist_ok=True)


def setup(app: Sphinx) -> dict:
    """Make the directive known, and take the slides along."""
    app.add_directive("decks", Decks)
    app.connect("build-finished", _copy)
    return {"parallel_read_safe": True}
