"""Run chapters as Colab would: with its packages, on a machine that has nothing else.

    make colab                     all chapters
    make colab CHAPTERS="01 09"    some, by any part of their names

For each chapter there is a fresh machine: an empty `/content` (another folder stands in for it),
the imported module `google.colab` (the folder stand_in beside this file) and GitHub (a bare copy
of this repository, with what is not committed yet, at the tag of the set-up cell). Then all cells
of the reader's copy (see `tools.book`) are run, the set-up cell twice. Nothing may be installed by
that, the floors of pyproject.toml must be met, no cell may fail, and what a cell prints must be
what the chapter stores. It is not Colab itself, and the models come from the cache of this
machine: name an empty one in BDUTILS_CACHE to have them trained.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tools import book

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
START = "/content"  # where a notebook starts on Colab
WIDGET = "application/vnd.jupyter.widget-view+json"


def call(*command: object) -> str:
    """Return what a command prints, and stop if it fails."""
    return subprocess.run([*map(str, command)], check=True, text=True, stdout=subprocess.PIPE,
                          cwd=ROOT).stdout.strip()


def pip(*arguments: str) -> str:
    """Return what pip says of this environment."""
    return call(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def github(folder: Path, tag: str) -> Path:
    """Return a bare repository whose tag is what lies here, committed or not."""
    author = ("-c", "user.name=stand-in", "-c", "user.email=stand-in@example.invalid")
    state = call("git", *author, "stash", "create") or call("git", "rev-parse", "HEAD")
    call("git", "init", "-q", "--bare", folder)
    for name, place in (("objects", "objects/info/alternates"), ("shallow", "shallow")):
        there = ROOT / call("git", "rev-parse", "--git-path", name)
        if there.exists():  # only a clone without history has the second one
            (folder / place).write_text(f"{there}\n" if there.is_dir() else there.read_text())
    call("git", "-C", folder, "update-ref", f"refs/tags/{tag}", state)
    return folder


def machine(folder: Path, tag: str) -> dict[str, str]:
    """Make a machine that has nothing but an empty `/content`; return its environment."""
    (folder / "content").mkdir()
    start = folder / "ipython/profile_default/startup"
    start.mkdir(parents=True)
    (start / "colab.py").write_text("import google.colab\n")  # Colab's kernel has done so
    address = PROJECT["urls"]["Repository"]
    return {**{k: v for k, v in os.environ.items() if k != "BDUTILS_QUIET"},
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # else the debugger's advice fills the screen
            "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(FOLDER / "stand_in"),
            "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": f"{address}.git",
            "GIT_CONFIG_KEY_0": f"url.file://{github(folder / 'github.git', tag)}.insteadOf"}


def said(cell: nbformat.NotebookNode) -> str:
    """Return the text that a cell printed or showed; widgets, images and tables aside."""
    return "".join(
        output.text if output.output_type == "stream" and output.name == "stdout"
        else output.get("data", {}).get("text/plain", "") if WIDGET not in output.get("data", {})
        else "" for output in cell.outputs)


def run_all(path: Path, cells: int | None = None) -> tuple[list[str], dict]:
    """Run a chapter's cells on a fresh machine.

    Args:
        path: Of the notebook.
        cells: How many of them, all if None.

    Returns:
        What went wrong, one sentence each; what it cost.
    """
    stored = {cell.id: said(cell) for cell in nbformat.read(path, as_version=4).cells
              if cell.cell_type == "code"}
    notebook = nbformat.reads(book.copy_for_colab(path), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"][:cells]
    measure = nbformat.v4.new_code_cell("from tools import status\nprint(status.spent())")
    notebook.cells = [code[0], nbformat.v4.new_code_cell(code[0].source), *code[1:], measure]
    with tempfile.TemporaryDirectory() as folder:
        tag = re.search(r"--branch (\S+)", code[0].source).group(1)
        environment = machine(Path(folder), tag)
        content = f"{folder}/content"
        for cell in notebook.cells:
            cell.source = cell.source.replace(START, content)
        start = time.perf_counter()
        NotebookClient(notebook, timeout=3600, kernel_name="python3", coalesce_streams=True,
                       resources={"metadata": {"path": content}}).execute(env=environment)
        seconds = time.perf_counter() - start
        left = sorted(set(os.listdir(content)) - {"book"})
        wrong = [f"it left {left} in {START}"] if left else []
    wrong += [f"the set-up cell says {said(x)!r}" for x in notebook.cells[:2] if x.outputs]
    wrong += [f"{cell.id} says {said(cell)!r}, but stored is {stored[cell.id]!r}" for cell in code
              if "nbval-ignore-output" not in cell.metadata.get("tags", ())
              and said(cell) != stored[cell.id]]
    return wrong, {"wall_seconds": seconds, **json.loads(measure.outputs[-1].text)}


def main(names: list[str]) -> None:
    """Run chapters and say which of them would work."""
    chapters = book.chosen(names)
    listed = pip("list", "--format=freeze")
    chosen = re.findall(r"^([\w-]+)", (FOLDER / "colab.txt").read_text(), re.MULTILINE)
    print(f"Python {platform.python_version()},",
          ", ".join(f"{name} {version(name)}" for name in chosen))
    wanted = json.loads(pip("install", "--dry-run", "--quiet", "--report", "-",
                            *PROJECT["dependencies"]))["install"]
    failed = [f"floors: {each['metadata']['name']} would be installed" for each in wanted]
    for path in chapters:
        try:
            wrong, cost = run_all(path)
            print(f"{path.stem}: {cost['wall_seconds']:.0f} s, {cost['cpu_seconds']:.0f} s of "
                  f"processor time, {cost['peak_memory_mib']} MiB, {len(cost['trained'])} models "
                  f"trained, {len(wrong)} faults", flush=True)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if pip("list", "--format=freeze") != listed:
            wrong.append("it installed something")
        failed += [f"{path.stem}: {text}" for text in wrong]
    sys.exit("\n".join(failed) or 0)


if __name__ == "__main__":
    main(sys.argv[1:])
