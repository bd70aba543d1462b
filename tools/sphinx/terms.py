"""Link the first mention of each glossary term on a chapter's page, so that no text must do it."""

import re
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

GLOSSARY = Path(__file__).resolve().parents[2] / "chapters" / "glossary.md"
# Everyday words too: a link from each page's first "gap" would explain another gap than is meant.
EVERYDAY = {"adapter", "agreement", "contrast", "evidence", "excess", "fine-tuning", "floor",
            "gap", "inverted", "purity", "seed", "student", "suspect", "teacher"}
# Text in these is a name, code or a link already.
CLOSED = (nodes.literal, nodes.reference, pending_xref, nodes.title, nodes.math, nodes.raw,
          nodes.caption, nodes.term, nodes.table, nodes.image)


def terms() -> list[str]:
    """Return the glossary's terms that are linked, longest first."""
    body = GLOSSARY.read_text(encoding="utf8").split(":::{glossary}")[1].split("\n:::")[0]
    found = set(re.findall(r"^(\S.*)$", body, re.MULTILINE)) - EVERYDAY
    return sorted(found, key=len, reverse=True)


def link_terms(doctree: nodes.document, known: list[str]) -> list[str]:
    """Turn the first mention of each term into a reference; return the terms that were found."""
    # The author linked some, and knows better where.
    linked = {node["reftarget"].lower() for node in doctree.findall(pending_xref)
              if node.get("reftype") == "term"}
    left, found = [term for term in known if term.lower() not in linked], []
    for text in filter(_open, list(doctree.findall(nodes.Text))):
        parts, rest = [], str(text)
        while left and (hit := re.search("|".join(map(_pattern, left)), rest)):
            term = next(term for term in left if re.fullmatch(_pattern(term), hit[0]))
            left.remove(term)
            found.append(term)
            parts += [nodes.Text(rest[:hit.start()]), _reference(term, hit[0])]
            rest = rest[hit.end():]
        if parts:
            text.parent.replace(text, [*parts, nodes.Text(rest)])
    return found


def _pattern(term: str) -> str:
    """Match a term as it is, or with a capital at the start of a sentence."""
    first = f"[{term[0].upper()}{term[0]}]"
    return rf"(?<![\w-]){first}{re.escape(term[1:])}(?![\w-])"


def _open(text: nodes.Text) -> bool:
    """Tell whether a text is running text of a paragraph."""
    node, inside = text.parent, False
    while node is not None:
        if isinstance(node, CLOSED):
            return False
        inside = inside or isinstance(node, nodes.paragraph)
        node = node.parent
    return inside


def _reference(term: str, shown: str) -> pending_xref:
    return pending_xref("", nodes.inline("", shown, classes=["bd-term"]), refdomain="std",
                        reftype="term", reftarget=term, refexplicit=True, refwarn=True)


def setup(app: Sphinx) -> dict:
    """Do so on the pages of chapters, which are notebooks."""
    known = terms()

    def read(app: Sphinx, doctree: nodes.document) -> None:
        app.env.note_dependency(str(GLOSSARY))
        if str(app.env.doc2path(app.env.docname)).endswith(".ipynb"):
            link_terms(doctree, known)

    app.connect("doctree-read", read)
    return {"parallel_read_safe": True}
