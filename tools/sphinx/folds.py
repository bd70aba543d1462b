"""Say what is in a folded cell: the names that it defines, imports, or a figure."""

import ast
import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx

MOST = 3  # names in a line


def said(code: str) -> str:
    """Return what a reader will see on opening a cell, such as "Code: Writer, load()".

    Args:
        code: Of the cell.
    """
    if "google.colab" in code:
        return "Set-up for Colab" if "git clone" in code else "A package for Colab"
    lines = [line for line in code.splitlines() if not line.lstrip().startswith(("!", "%"))]
    try:
        body = ast.parse("\n".join(lines)).body
    except SyntaxError:  # a magic that is no line of its own, as below an `if`
        return "Code"
    names = [*dict.fromkeys(name for statement in body for name in _names(statement)
                            if name != "_")]
    if defined := [name for name in names if name.endswith("()") or name[0].isupper()]:
        names = defined
    elif "plt." in code or "sns." in code:
        return "Code of the figure"
    if names:
        return f"Code: {', '.join(names[:MOST])}{', ...' if len(names) > MOST else ''}"
    return _imports(code, body)


def _imports(code: str, body: list[ast.stmt]) -> str:
    """Say which imports they are, since two such cells often follow each other."""
    if not any(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in body):
        return "Code"
    if module := re.search(r"^#\| (?:default_exp|export) (\S+)$", code, re.MULTILINE):
        return f"Imports of bdutils.{module[1]}"
    own = all(isinstance(statement, ast.ImportFrom)
              and str(statement.module).startswith("bdutils") for statement in body)
    return "Imports from bdutils" if own else "Imports"


def _names(statement: ast.stmt) -> Iterator[str]:
    """Give the functions, classes and values that a statement defines."""
    if isinstance(statement, ast.FunctionDef):
        yield f"{statement.name}()"
    elif isinstance(statement, ast.ClassDef):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (node.id for target in targets for node in ast.walk(target)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


def _name_folds(app: Sphinx, doctree: nodes.document) -> None:
    for cell in doctree.findall(nodes.container):
        if cell.get("nb_element") == "cell_code" and cell.get("hide_mode") == "input":
            source = next(iter(cell.findall(nodes.literal_block)), None)
            if source is not None:
                cell["prompt_show"] = cell["prompt_hide"] = said(source.astext())


def setup(app: Sphinx) -> dict:
    """Name folded cells when a page has been read."""
    app.connect("doctree-read", _name_folds)
    return {"parallel_read_safe": True}
