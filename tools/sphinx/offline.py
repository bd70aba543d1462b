"""Keep the pages from asking other hosts: they use the scripts that `make vendor` could fetch."""

from pathlib import Path

from docutils.nodes import document
from sphinx.application import Sphinx

MATHJAX = "vendor/mathjax/es5/tex-mml-chtml.js"
TABLES = "vendor/simple-datatables/dist/umd/simple-datatables.js"
TABLES_STYLE = "vendor/simple-datatables/dist/style.css"


def setup(app: Sphinx) -> dict:
    """Point Sphinx at the local copies, if they are there."""
    static = Path(__file__).resolve().parents[2] / "vendor" / "_static"
    app.connect("config-inited", lambda app, config: config.html_extra_path.extend(
        ["vendor"] if static.is_dir() else []))
    if (static / MATHJAX).is_file():
        app.connect("config-inited", lambda app, config: setattr(config, "mathjax_path", MATHJAX))
    else:
        print("MathJax is not in vendor/ (`make vendor` needs npm): formulas need a network")
    if (static / TABLES).is_file():
        app.connect("html-page-context", _sortable)
    app.connect("html-page-context", _without_thebe, priority=900)
    return {"parallel_read_safe": True}


def _sortable(app: Sphinx, pagename: str, templatename: str, context: dict,
              doctree: document | None) -> None:
    """Give a page with such a table the library that sorts it; `tables.js` is on every page."""
    if "bd-sortable" in context.get("body", ""):
        app.add_css_file(TABLES_STYLE)
        app.add_js_file(TABLES)


def _without_thebe(app: Sphinx, pagename: str, templatename: str, context: dict,
                   doctree: document | None) -> None:
    """Leave out the scripts of Thebe, which is off: they fail twice a page and name a host."""
    context["script_files"] = [script for script in context["script_files"]
                               if "thebe" not in str(script).lower()]
