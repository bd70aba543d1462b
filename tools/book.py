"""The authors' tool: keep chapters, package and addresses in step.

    python -m tools.book export          exported cells -> modules of the package; copies for Colab
    python -m tools.book check           fail if that would change anything
    python -m tools.book execute [NAME]  run chapters, store their outputs, in place
    python -m tools.book address URL     write the repository's address everywhere

A code cell that starts with `#| export` is copied into the module that the notebook's
`#| default_exp` names, so the reader, the tests and later chapters use one and the same code.

What a reader opens on Colab is a copy of the chapter, in the folder `colab`: it has no solutions
and no outputs, and says where on the pages the solutions are.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import status

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = ROOT / "chapters"
# Files that repeat the address of pyproject.toml; the notebooks are added when needed.
WITH_ADDRESS = ("pyproject.toml", "_config.yml", "README.md", "CITATION.cff", "CONTRIBUTING.md",
                "chapters/how_to_use.md", "chapters/audit.md")


def notebooks(template: bool = False) -> list[Path]:
    """Return all chapters that are notebooks, in reading order.

    Args:
        template: Give the notebook that new chapters are copied from as well.
    """
    return sorted(p for p in CHAPTERS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
                  and (template or not p.name.startswith("_")))


def chosen(names: Sequence[str], template: bool = False) -> list[Path]:
    """Return the chapters that have one of these parts in their names, all if none is given.

    A name that fits no chapter ends the program.
    """
    there = notebooks(template)
    if wrong := [name for name in names if not any(name in path.name for path in there)]:
        raise SystemExit(f"no chapter has {', '.join(wrong)} in its name; there are "
                         f"{', '.join(path.stem for path in there)}")
    return [path for path in there if not names or any(name in path.name for name in names)]


_BLOCK = re.compile(
    r"^:::\{(exercise|solution)(-start)?\} ?(\S*)\n((?::\w+:[^\n]*\n)*)(?(2):::\n)(.*?)^:::",
    re.MULTILINE | re.DOTALL)
_FENCE = "\0"  # around code, where all cells of a chapter are one text
_CHECK = re.compile(r"^check_\w+\(.*\)$", re.MULTILINE)
_IMPORT = re.compile(r"^from bdutils\.exercises import .*\n", re.MULTILINE)
_HIDDEN = re.compile(  # on Colab nothing is folded
    r"^:::\{solution-start\} (\S+)\n.*?^:::\{solution-end\}\n:::$"
    r"|^:::\{solution\} (\S+)\n.*?^:::$|^:::\{admonition\} Answers\n.*?^:::$",
    re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Exercise:
    """An exercise of a chapter."""

    label: str
    """By which the book refers to it."""
    place: int
    """Its number in the chapter."""
    difficulty: str
    """Easy, medium or hard."""
    minutes: int
    """That it takes."""
    code: bool
    """Whether code is to be written."""
    statement: str
    """In MyST Markdown."""
    words: str
    """Of the solution, empty if it has none."""
    program: str
    """Code of the solution, empty if it has none."""
    stub: str = ""
    """What the reader fills in, empty if it has none."""
    check: str = ""
    """The call of `bdutils.exercises` below the stub."""


def exercises(path: Path) -> Iterator[Exercise]:
    """Yield the exercises of a chapter, in their order.

    Args:
        path: Of the notebook.

    Raises:
        ValueError: For an exercise that does not say how hard and how long it is.
    """
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    text = "\n\n".join("".join(c["source"]) if c["cell_type"] == "markdown" else
                       f"{_FENCE}{''.join(c['source'])}{_FENCE}" for c in cells) + "\n"
    found: dict[str, dict[str, str]] = {}
    for block in _BLOCK.finditer(text):
        kind, _, name, options, body = block.groups()
        label = name or re.search(r":label: (\S+)", options)[1]
        found.setdefault(label, {})[kind] = body
        below = re.split(r"^:::\{(?!\w+-end)", text[block.end():], flags=re.MULTILINE)[0]
        for code in below.split(_FENCE)[1::2]:
            if kind == "exercise" and (call := _CHECK.search(code)):
                stub = _IMPORT.sub("", _CHECK.sub("", code))
                found[label] |= {"check": call[0], "stub": stub.strip()}
    for place, (label, parts) in enumerate(found.items(), 1):
        about = re.search(r"\*(\w+), (\d+) minutes(, code)?\.\*", parts["exercise"])
        if not about:
            raise ValueError(f"exercise {label} of {path.name} must start like "
                             "*Easy, 10 minutes, code.*")
        solution = parts.get("solution", "").split(_FENCE)
        yield Exercise(label, place, about[1].lower(), int(about[2]), bool(about[3]),
                       parts["exercise"], "\n\n".join(x.strip() for x in solution[::2]).strip(),
                       "\n\n\n".join(solution[1::2]), parts.get("stub", ""),
                       parts.get("check", ""))


def page(stem: str) -> str:
    """Return the address of a chapter's published page."""
    owner, repository = address().split("/")[-2:]
    return f"https://{owner}.github.io/{repository}/chapters/{stem}.html"


def copy_for_colab(path: Path) -> str:
    """Return a chapter without solutions and without outputs.

    Args:
        path: Of the notebook.
    """
    def link(hidden: re.Match) -> str:
        label = hidden[1] or hidden[2]
        there = f"{page(path.stem)}#{label or 'questions'}"
        return f"*{'Solution' if label else 'Answers'}: on [the page of this chapter]({there}).*"

    notebook = json.loads(path.read_text(encoding="utf8"))
    text = "".join(f"\0{i}\0\n{''.join(cell['source'])}\n"
                   for i, cell in enumerate(notebook["cells"]))
    parts = re.split("\0(\\d+)\0\n", _HIDDEN.sub(link, text))[1:]
    cells = []
    for i, source in zip(parts[::2], parts[1::2]):
        cell = notebook["cells"][int(i)]
        tags = {"tags": cell["metadata"]["tags"]} if "tags" in cell["metadata"] else {}
        cells.append(cell | {"metadata": tags, "source": source.strip("\n").splitlines(True)})
        if cell["cell_type"] == "code":
            cells[-1] |= {"outputs": [], "execution_count": None}
    return json.dumps(notebook | {"cells": cells}, indent=1, ensure_ascii=False) + "\n"


def copies() -> dict[Path, str]:
    """Return what the copies for Colab must be."""
    return {ROOT / "colab" / path.name: copy_for_colab(path) for path in notebooks()}


def export(package: Path = ROOT / "bdutils") -> None:
    """Write the exported cells of all chapters into modules.

    Args:
        package: Folder that receives them.

    Source: nbdev's `nb_export`.
    """
    from nbdev.export import nb_export
    from nbdev.maker import ModuleMaker

    class Whole(ModuleMaker):
        """Makes each module anew: nbdev appends to one that `#| export NAME` names."""

        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **{**options, "is_new": True})

    for path in notebooks():
        if "default_exp" in path.read_text(encoding="utf8"):
            nb_export(path, lib_path=package, mod_maker=Whole)


def write_copies() -> None:
    """Write the copies for Colab."""
    for path, text in copies().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf8")


def check() -> list[str]:
    """Return the exported modules and the copies for Colab that differ from the chapters."""
    stale = [str(path.relative_to(ROOT)) for path, text in copies().items()
             if not path.is_file() or path.read_text(encoding="utf8") != text]
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".export-") as folder:
        made = Path(folder) / "bdutils"
        made.mkdir()
        export(made)
        for path in made.rglob("*.py"):
            kept = ROOT / "bdutils" / path.relative_to(made)
            if not kept.is_file() or _code(kept) != _code(path):
                stale.append(str(kept.relative_to(ROOT)))
    return stale


def _code(path: Path) -> str:
    """Leave out the notes that say where a cell comes from: their paths depend on the folder."""
    lines = path.read_text(encoding="utf8").splitlines()
    return "\n".join(x for x in lines if not x.startswith(("# %%", "# AUTOGENERATED")))


def execute(paths: list[Path], costs: Path = status.FOLDER) -> None:
    """Run notebooks in place and store what they print; record what that cost.

    Args:
        paths: Of the notebooks.
        costs: Folder of the records.

    Raises:
        CellExecutionError: At the first cell that fails; that notebook stays as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    from bdutils.plotting import small

    os.environ["BDUTILS_QUIET"] = "1"  # no progress bars in stored outputs
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(status.MEASURE))
        start = time.perf_counter()
        NotebookClient(notebook, timeout=1800, kernel_name="python3", coalesce_streams=True,
                       resources={"metadata": {"path": str(path.parent)}}).execute()
        seconds = time.perf_counter() - start
        measured = notebook.cells.pop().outputs[-1].text
        sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
        if not path.name.startswith("_"):  # the template costs nothing
            status.save(status.record(path.stem, sources, seconds, measured), costs)
        for cell in notebook.cells:  # times of execution would change the file every time
            cell.metadata.pop("execution", None)
            for output in cell.get("outputs", ()):
                if figure := output.get("data", {}).get("image/png"):
                    shrunk = small(base64.b64decode(figure))
                    output.data["image/png"] = base64.b64encode(shrunk).decode()
        nbformat.write(notebook, path)
        print(f"executed {path.name} in {seconds:.0f} s")


def address() -> str:
    """Return the repository's address, which stands in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf8")
    return re.search(r'^Repository = "(.+?)"$', text, re.MULTILINE).group(1)


def set_address(url: str) -> None:
    """Replace the repository's address in every file that repeats it.

    Args:
        url: Such as https://github.com/ORG/REPO.

    Raises:
        ValueError: For anything else.
    """
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
        raise ValueError(f"{url!r} is not of the form https://github.com/ORG/REPO")
    old, new = (u.removeprefix("https://github.com/") for u in (address(), url))
    # The second form is the address of the published pages.
    pages = [u.replace("/", ".github.io/") for u in (old, new)]
    for path in [*(ROOT / name for name in WITH_ADDRESS), *notebooks(template=True)]:
        text = path.read_text(encoding="utf8")
        path.write_text(text.replace(old, new).replace(*pages), encoding="utf8")


def main(arguments: list[str]) -> None:
    """Run one command of this tool; see the module's text."""
    match arguments:
        case ["export"]:
            export()
            write_copies()
        case ["check"]:
            if stale := check():
                raise SystemExit(f"out of step with the chapters: {', '.join(stale)}; run "
                                 "`python -m tools.book export`")
            print("chapters and package are in step")
        case ["execute", *names]:
            execute(chosen(names, template=True))
        case ["address", url]:
            set_address(url)
            write_copies()
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
