"""The field's words: names, keys, headings and texts of figures that use others.

    python -m tests.helpers.vocabulary [FILE...]      list them
"""

from __future__ import annotations

import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# As a part of a name (snake_case or CamelCase): what the field says instead.
PARTS = {
    "image": "picture pictures pictured",
    "trigger, triggered": "mark marks marked marking unmarked",
    "sample, index": "row rows",
    "epoch": "passes",
    "gradient, unlearning": "slope slopes push pushes pushed kick",
    "clean set": "reserved",
    "training set": "pool",
    "evaluator": "examiner examine",
    "input filter": "guard guards guarded",
    "reject": "refuse refused refuses refusing refusal refusals",
    "evidence, suspect class": "charge charges charged accused accuse accuses",
    "dormant, pruned": "sleeper sleepers silenced",
    "clone, stratified subset": "twin twins evenly",
    "gradient ascent": "climb climbs climbing",
    "PoisonRecord, AttackConfig": "truth deed deeds",
    "process group": "team teams",
    "prepare, fit": "armed teach fresh",
    "run_one": "perform performs claimed",
    "eval_every, quick_eval, callback": "look looks glance watch watched watcher",
    "warped": "bend bends bent",
    "confident": "sure unsure",
}
WRONG = {old: new for new, olds in PARTS.items() for old in olds.split()}
# As a whole string: keys of attacks, defenses and roles.
KEYS = {"patch": "badnets", "sine": "sig", "warp": "wanet", "input-aware": "input_aware",
        "corners": "label_consistent", "syntax": "synbkd", "style": "stylebkd", "tuning": "ft",
        "pruning": "fp", "sam": "ft_sam", "reserved": "clean", "pool": "train"}
# In headings and in what a cell prints, where texts of the data may have a "he".
SHOWN = re.compile(
    r"\b(pictures?|marks?|marked|marking|unmarked|passes|slopes?|reserved|examiners?|refused|"
    r"accused|sleepers|silenced|twins?|unsure|per cent|guards?)\b|\d %", re.IGNORECASE)
# Names of other libraries, of tables of rows, and of a court's words where they are meant.
ALLOWED = {"pytestmark", "mark", "marks", "ProcessPoolExecutor", "ThreadPoolExecutor",
           "pytest_assertion_pass",
           "iterrows", "row_number", "nrows", "writerow", "writerows", "markdown_it",
           "max_memory_reserved", "get_random_state"}


def parts(name: str) -> list[str]:
    """Return the words of a name, in lower case."""
    split = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", name)
    return [part.lower() for part in split.split("_") if part]


def in_code(source: str, tables: bool = False) -> Iterator[tuple[int, str, str]]:
    """Yield line, word and the field's word for each name and key of a source.

    Args:
        source: Python.
        tables: Whether rows are those of a table here.
    """
    lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.split("\n")]
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.type == tokenize.NAME and token.string not in ALLOWED:
            for part in parts(token.string):
                if part in WRONG and not (tables and part in ("row", "rows")):
                    yield token.start[0], token.string, WRONG[part]
        elif token.type == tokenize.STRING:
            body = re.fullmatch(r"""[rbRB]*["']([\w-]+)["']""", token.string)
            if body and body[1] in KEYS:
                yield token.start[0], token.string, KEYS[body[1]]


def in_heading(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, heading and the word in it that the field does not use."""
    for number, line in enumerate(text.split("\n"), 1):
        if re.match(r"#+ ", line) and (found := SHOWN.search(line)):
            yield number, line, found[0]


def shown(notebook: dict) -> Iterator[tuple[int, str, str]]:
    """Yield cell, text and word for what the cells of a notebook print."""
    for number, cell in enumerate(notebook["cells"]):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts = [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
            for text in texts:
                for line in "".join(text).split("\n"):
                    if len(line) < 1000 and (found := SHOWN.search(line)):
                        yield number, line.strip()[:80], found[0]


def of_file(path: Path) -> list[str]:
    """Return what is wrong in a file, one line each."""
    text = path.read_text(encoding="utf8")
    if path.suffix == ".md":
        return [f"{n}: {what!r}: {word}" for n, what, word in in_heading(text)]
    if path.suffix == ".py":
        tables = bool(re.search(r"import pandas|import csv|from pandas", text))
        return [f"{n}: {what} -> {word}" for n, what, word in in_code(text, tables)]
    notebook, found = json.loads(text), []
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        hits = in_code(source, True) if cell["cell_type"] == "code" else in_heading(source)
        found += [f"cell {number}, {n}: {what} -> {word}" for n, what, word in hits]
    return found + [f"output of cell {n}: {what!r}: {word}" for n, what, word in shown(notebook)]


def files() -> list[Path]:
    """Return what the book and its package are made of."""
    patterns = ("bdutils/**/*.py", "tools/**/*.py", "benchmarks/**/*.py", "tests/**/*.py",
                "chapters/**/*.ipynb", "chapters/**/*.md", "README.md", "CONTRIBUTING.md")
    return sorted(p for pattern in patterns for p in ROOT.glob(pattern)
                  if ".ipynb_checkpoints" not in p.parts and p != Path(__file__).resolve()
                  and "bdutils/_data" not in str(p))


if __name__ == "__main__":
    for file in [Path(name) for name in sys.argv[1:]] or files():
        for line in of_file(file):
            print(f"{file}: {line}")
