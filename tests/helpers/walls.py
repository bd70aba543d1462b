"""Who may see what: names in a source, and what a module imports."""

import ast
from pathlib import Path

import bdutils

SECRETS = {"test", "TestSet", "Task", "Victim", "Truth", "truth", "poisoned", "trigger",
           "target_label", "triggered", "asr"}


def names_in(tree):
    return {getattr(node, field) for node in ast.walk(tree)
            for field in ("id", "attr", "arg", "name", "module")
            if isinstance(getattr(node, field, None), str)}


def imported(path):
    """Return the modules of the package that a module of it imports, itself or by others."""
    root, found, todo = Path(bdutils.__file__).parent, set(), [Path(path)]
    while todo:
        here = todo.pop()
        found.add(here.relative_to(root).as_posix())
        for node in ast.walk(ast.parse(here.read_text(encoding="utf8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                assert "bdutils" not in (ast.unparse(node) if isinstance(
                    node, ast.Import | ast.ImportFrom) else "")
                continue
            base = here.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for one in (base.with_suffix(".py"), *(base / f"{a.name}.py" for a in node.names)):
                if one.is_file() and one.relative_to(root).as_posix() not in found:
                    todo.append(one)
    return found
