"""Which module may know which: the contracts of pyproject.toml, circles, private names."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parent.parent

def broken(folder):
    """Return the contracts that the package in a folder breaks."""
    run = "from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", run, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                            env={"PATH": "", "PYTHONPATH": str(folder)})
    assert " kept, " in result.stdout, result.stdout + result.stderr
    return [line for line in result.stdout.splitlines() if line.endswith(" BROKEN")]


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(ROOT / "bdutils", tmp_path / "bdutils")
    return tmp_path


def test_the_walls_stand_and_a_hole_is_seen(copied):
    assert broken(copied) == []
    module = copied / "bdutils/defenses/dup.py"
    module.write_text(module.read_text() + "\nfrom ..evaluation import evaluate\n")
    assert len(broken(copied)) == 2  # a layer, and what a defense may know


def test_a_detour_is_seen(copied):
    """Of modules that a defense may import, none may import an attack."""
    module = copied / "bdutils/training.py"
    module.write_text(module.read_text() + "\nfrom .attacks.base import poison_dataset\n")
    assert len(broken(copied)) == 2


def circles(graph):
    """Return the modules from which imports lead back to themselves."""
    def reached(module):
        found, todo = set(), [module]
        while todo:
            here = todo.pop()  # which may import itself, as a program that has workers does
            new = graph.find_modules_directly_imported_by(here) - found - {here}
            found |= new
            todo += new
        return found

    return [module for module in graph.modules if module in reached(module)]


def test_no_imports_lead_in_a_circle():
    graph = grimp.build_graph("bdutils")
    assert circles(graph) == []
    graph.add_import(importer="bdutils.metrics", imported="bdutils.evaluation")
    assert {"bdutils.metrics", "bdutils.evaluation"} <= {*circles(graph)}


def private(text):
    """Return the private names that a source takes from other modules."""
    tree = ast.parse(text)
    modules = {alias.asname or alias.name for node in ast.walk(tree)
               if isinstance(node, ast.ImportFrom) and node.level for alias in node.names
               if alias.name.islower()}
    taken = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
             for alias in node.names]
    taken += [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
              and isinstance(node.value, ast.Name) and node.value.id in modules]
    return [name for name in taken if name.startswith("_") and not name.startswith("__")]


def test_no_private_name_crosses_a_module():
    for path in (ROOT / "bdutils").rglob("*.py"):
        assert private(path.read_text()) == [], path
    assert private("from .text import _split") == ["_split"]
    assert private("from . import text\ntext._split()") == ["_split"]


def test_no_test_file_imports_another_and_no_module_of_the_package_a_tool():
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bdutils").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [
                alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("test_") for name in names), path
            assert path.is_relative_to(ROOT / "tests") or not any(
                name.partition(".")[0] == "tools" for name in names), path
