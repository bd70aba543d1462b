"""Take MathJax from the book itself if `make book` could fetch it, else from its usual address."""

from pathlib import Path

LOCAL = "vendor/mathjax/tex-mml-chtml.js"


def setup(app) -> dict:
    """Point Sphinx at the local copy, if there is one."""
    root = Path(__file__).resolve().parent.parent
    if (root / "vendor" / "_static" / LOCAL).is_file():
        app.connect("config-inited", _use_local_copy)
    else:
        print("MathJax is not in vendor/ (`make vendor` needs npm): formulas need a network")
    return {"parallel_read_safe": True}


def _use_local_copy(app, config) -> None:
    config.mathjax_path = LOCAL
    config.html_extra_path = ["vendor"]
