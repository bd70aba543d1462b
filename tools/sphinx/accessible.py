"""Mend what CSS cannot in the pages: for readers who do not see them, and for a phone."""

import re

from docutils.nodes import document
from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict:
    """Change what the theme is about to write."""
    # The theme adds the function that is wrapped here at the usual priority, 500.
    app.connect("html-page-context", _name_folds, priority=600)
    app.connect("html-page-context", _list_citations)
    app.connect("html-page-context", _keep_intervals_whole)
    return {"parallel_read_safe": True}


def _name_folds(app: Sphinx, pagename: str, templatename: str, context: dict,
                doctree: document | None) -> None:
    """Give the arrows that unfold a part of the contents a name."""
    made = context["generate_toctree_html"]
    context["generate_toctree_html"] = lambda *args, **kwargs: str(made(*args, **kwargs)).replace(
        "<summary>", '<summary aria-label="Pages of this part">')


def _list_citations(app: Sphinx, pagename: str, templatename: str, context: dict,
                    doctree: document | None) -> None:
    """Give the entries of the bibliography, a list, the role that replaced docutils' one."""
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def _keep_intervals_whole(app: Sphinx, pagename: str, templatename: str, context: dict,
                          doctree: document | None) -> None:
    """Let no line of a table end between a number and its interval, inside of it, or after `n`."""
    def whole(cell: re.Match) -> str:
        text = re.sub(r"(\d) \[(-?[\d.]+), (-?[\d.]+)\]", "\\1\u00a0[\\2,\u00a0\\3]", cell[0])
        return re.sub(r"\(n = (\d+)\)", "(n\u00a0=\u00a0\\1)", text)

    if "body" in context:
        context["body"] = re.sub(r"<td\b.*?</td>", whole, context["body"], flags=re.DOTALL)
