"""How to cite the book, made by the build from CITATION.cff: `:::{citation}`."""

from pathlib import Path

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FILE = Path(__file__).resolve().parents[2] / "CITATION.cff"


def bibtex(about: dict) -> str:
    """Return the entry; the year is there from the first release on."""
    # A second pair of braces keeps the name of a group in one piece.
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" if "family-names" in a
                           else f"{{{a['name']}}}" for a in about["authors"])
    fields = {"title": f"{{{about['title']}}}", "author": authors,
              "year": str(about.get("date-released", ""))[:4],
              "version": about["version"], "url": about["repository-code"]}
    lines = [f"  {name} = {{{text}}}" for name, text in fields.items() if text]
    return "@software{backdoorbook,\n" + ",\n".join(lines) + "\n}"


class Citation(SphinxDirective):
    """The entry in a box that has a button to copy it."""

    def run(self) -> list[nodes.Node]:
        """Return the box."""
        self.env.note_dependency(str(FILE))
        text = bibtex(yaml.safe_load(FILE.read_text(encoding="utf8")))
        return [nodes.literal_block(text, text, language="bibtex")]


def setup(app: Sphinx) -> dict:
    """Make the directive known."""
    app.add_directive("citation", Citation)
    return {"parallel_read_safe": True}
