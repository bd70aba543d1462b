"""Describe each page to search engines and in link previews.

A chapter as the first page describes it, another page by `description` in its front matter.
"""

import html
import re
from pathlib import Path

from docutils.nodes import document
from sphinx.application import Sphinx

INDEX = Path(__file__).resolve().parents[2] / "chapters" / "index.md"


def descriptions() -> dict[str, str]:
    """Return what the first page's list says of each chapter, by page."""
    found = re.findall(r"^\{doc\}`(\w+)`\n: (.*?)\n\n", INDEX.read_text(encoding="utf8"),
                       re.MULTILINE | re.DOTALL)
    return {f"chapters/{name}": " ".join(text.split()) for name, text in found}


def setup(app: Sphinx) -> dict:
    """Give them to the pages before sphinxext.opengraph takes the first words of the text."""
    known = descriptions()

    def describe(app: Sphinx, pagename: str, templatename: str, context: dict,
                 doctree: document | None) -> None:
        about = known.get(pagename) or (context.get("meta") or {}).get("description")
        if about:
            context["meta"]["og:description"] = about
            context["metatags"] += f'<meta name="description" content="{html.escape(about)}" />\n'

    app.connect("html-page-context", describe, priority=400)
    return {"parallel_read_safe": True}
