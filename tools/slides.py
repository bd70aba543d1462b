"""Slides cut from the chapters: `python -m tools.slides`, or `make slides`.

The metadata of a cell say what of it is shown, and nothing is copied:

    "slideshow": {"slide_type": "slide", "show": ["It stays dormant", ["first", "last"], "---"]}

A cell without them is left out. `show` names units of a text cell by how they begin: headings,
sentences, list items, tables, displayed equations, algorithms; a pair means all from one to the
other, "---" begins another slide. Of a code cell the outputs are shown, and its code as well
where `code` is true.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nbformat import NotebookNode, from_dict
from nbformat import read as read_notebook
from nbformat.v4 import new_markdown_cell

from .book import ROOT, notebooks

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

OUT = ROOT / "_build" / "slides"
VENDOR = ROOT / "vendor" / "_static" / "vendor"
SCRIPTS = ("reveal.js", "mathjax")
OPENED = ("admonition", "note", "tip", "warning", "important", "prf:remark")
STARTS = ("slide", "subslide")


class Unit(NamedTuple):
    """The smallest part of a text that a slide can show."""

    kind: str
    """One of `heading`, `sentence`, `item`, `block` and `break`."""
    text: str
    """Its Markdown."""
    label: str = ""
    """Of a displayed equation."""


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt
    from mdit_py_plugins.colon_fence import colon_fence_plugin
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    return MarkdownIt("commonmark").enable("table").use(
        dollarmath_plugin, double_inline=True).use(colon_fence_plugin)


def units(text: str) -> Iterator[Unit]:
    """Yield the parts of a text cell in their order; exercises and solutions are none.

    Args:
        text: MyST Markdown.
    """
    lines = text.split("\n")
    for token in _parser().parse(text):
        if token.map is None or token.level not in (0, 1) or token.nesting < 0:
            continue
        block = "\n".join(lines[slice(*token.map)]).strip()
        if token.type == "list_item_open":
            yield Unit("item", block)
        elif token.level or token.type in ("bullet_list_open", "ordered_list_open"):
            continue  # inside of something that is a unit as a whole, or comes item by item
        elif token.type == "colon_fence":
            yield from _fence(token.info.strip(), token.content)
        elif token.type == "math_block_label":
            yield Unit("block", f"$${token.content}$$", token.info)
        elif token.type == "heading_open":
            yield Unit("heading", block.lstrip("# "))
        elif token.type == "paragraph_open":
            if not re.fullmatch(r"\([\w-]+\)=", block):
                yield from (Unit("sentence", part) for part in sentences(block))
        else:
            yield Unit("block", block)


def sentences(text: str) -> list[str]:
    """Return the sentences of a paragraph: one ends before a capital, a formula or emphasis.

    Args:
        text: The paragraph.
    """
    return re.split(r"(?<=[.!?:])(?<!et al\.)\s+(?=[A-Z`*$\[{(])", " ".join(text.split()))


def _fence(info: str, content: str) -> Iterator[Unit]:
    kind, _, title = info.partition("}")
    kind, title = kind.lstrip("{"), title.strip()
    body = re.sub(r"\A(\s*:[\w-]+:.*\n)+", "", content).strip()
    if kind in OPENED:
        yield Unit("heading", title)
        yield from units(body)
    elif kind in ("prf:algorithm", "prf:definition", "prf:theorem", "prf:property"):
        yield Unit("block", f"**{kind[4:].capitalize()}: {title}**\n\n{body}")


def chosen(text: str, show: Sequence | None) -> list[Unit]:
    """Return the units of a text that are shown, with "---" as a unit of its own kind.

    Args:
        text: Of the cell.
        show: See the module's text; None for all of it.

    Raises:
        ValueError: If nothing begins so, after what was found before.
    """
    there = list(units(text))
    if show is None:
        return there
    found, place = [], 0
    for entry in show:
        if entry == "---":
            found.append(Unit("break", ""))
            continue
        first, last = (entry, entry) if isinstance(entry, str) else entry
        start = _find(there, first, place)
        place = _find(there, last, start) + 1
        found += there[start:place]
    return found


def _find(there: Sequence[Unit], beginning: str, place: int) -> int:
    for i in range(place, len(there)):
        if " ".join(re.sub(r"^([-*]|\d+\.) ", "", there[i].text).split()).startswith(beginning):
            return i
    raise ValueError(f"nothing on the page begins with {beginning!r} any more: name it anew in "
                     "the cell's metadata, slideshow.show")


class Pages:
    """What the chapters are called and what their equations are numbered, for references."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read all chapters once."""
        from pybtex.database import parse_file

        self.equations, self.titles = {}, {}
        self.papers = parse_file(str(ROOT / "references.bib")).entries
        for number, path in enumerate(paths, start=1):
            texts = ["".join(c["source"]) for c in json.loads(path.read_text("utf8"))["cells"]
                     if c["cell_type"] == "markdown"]
            self.titles[path.stem] = f"chapter {number}"
            labels = [u.label for text in texts for u in units(text) if u.label]
            self.equations |= {x: f"{number}.{i}" for i, x in enumerate(labels, start=1)}

    def paper(self, key: str) -> str:
        """Return authors and year."""
        entry = self.papers[key]
        names = [" ".join(str(part) for part in (*p.rich_prelast_names, *p.rich_last_names))
                 for p in entry.persons["author"]]
        who = names[0] + (" et al." if len(names) > 2 else "".join(f" and {n}" for n in names[1:]))
        return f"{who} {entry.fields['year']}"

    def plain(self, text: str) -> str:
        """Return MyST without its roles.

        Args:
            text: Of a unit.
        """
        return re.sub(r"\{([\w:]+)\}`([^`]+)`", lambda m: self._role(m[1], m[2]), text)

    def _role(self, role: str, content: str) -> str:
        named = re.fullmatch(r"(.+?)\s*<([^>]+)>", content, re.DOTALL)
        if role.startswith("cite"):
            papers = "; ".join(self.paper(key.strip()) for key in content.split(","))
            return f"({papers})" if role == "cite:p" else papers
        if role == "eq":
            return f"({self.equations.get(content, '?')})"
        if named:
            return named[1]
        if role == "doc":
            return self.titles.get(Path(content).name, "the page on "
                                   + Path(content).name.replace("_", " "))
        if role == "term":
            return content
        kinds = {"fig": "the figure", "tab": "the table", "alg": "the algorithm",
                 "ex": "the exercise", "ch": "the chapter", "sec": "the section"}
        return kinds.get(content.partition("-")[0], "the page")

    def shown(self, units: Sequence[Unit]) -> Iterator[str]:
        """Yield units as plain Markdown; sentences become items, unless they lead to something."""
        for unit, following in pairwise([*units, None]):
            text = self.plain(unit.text)
            if unit.label:
                text = f"$${text.strip('$').rstrip()} \\tag{{{self.equations[unit.label]}}}$$"
            leads = following is not None and following.kind == "item"
            item = unit.kind == "sentence" and not leads and not text[0].islower()
            yield f"- {text}" if item else text


def cut(notebook: NotebookNode, pages: Pages) -> NotebookNode:
    """Return the slides of a chapter as a notebook, whose cells begin them or go on.

    Args:
        notebook: The chapter.
        pages: Of the book.

    Returns:
        Cells with `slideshow.slide_type`; each slide begins with a heading.

    Raises:
        ValueError: For a `show` that finds nothing or an unknown type.
    """
    made, title = [], ""
    for cell in notebook.cells:
        about = cell.metadata.get("slideshow", {})
        kind = about.get("slide_type", "skip")
        if kind not in (*STARTS, "fragment", "skip", "notes", "-"):
            raise ValueError(f"cell {cell.id}: unknown slide_type {kind!r}")
        if cell.cell_type == "markdown":
            if kind != "skip":
                try:
                    made += _texts(chosen(cell.source, about.get("show")), kind, title, pages)
                except ValueError as error:
                    raise ValueError(f"cell {cell.id}: {error}") from None
            headings = [u.text for u in units(cell.source) if u.kind == "heading"]
            title = pages.plain(headings[-1]) if headings else title
        elif kind != "skip":
            made += _outputs(cell, about, kind, title)
    return NotebookNode({**notebook, "cells": made})


def _texts(parts: Sequence[Unit], kind: str, title: str, pages: Pages) -> Iterator[NotebookNode]:
    while parts:
        end = next((i for i, unit in enumerate(parts) if unit.kind == "break"), len(parts))
        page, parts = parts[:end], parts[end + 1:]
        heads = [unit for unit in page if unit.kind == "heading"]
        # A slide has one heading: the last of those that are shown on it, or of those before it.
        title = pages.plain(heads[-1].text) if heads else title
        body = pages.shown([unit for unit in page if unit.kind != "heading"])
        head = [f"## {title}"] if kind in STARTS else []
        yield _cell("\n\n".join([*head, *body]), kind)
        kind = "slide"


def _cell(text: str, kind: str) -> NotebookNode:
    return new_markdown_cell(text, metadata={"slideshow": {"slide_type": kind}})


def _outputs(cell: NotebookNode, about: dict, kind: str, title: str) -> Iterator[NotebookNode]:
    if kind in STARTS:
        yield _cell(f"## {title}", kind)
        kind = "-"
    if about.get("code"):
        yield _cell(f"```python\n{cell.source}\n```", kind)
        kind = "-"
    yield from_dict({**cell, "metadata": {"slideshow": {"slide_type": kind}}})
    if caption := cell.metadata.get("mystnb", {}).get("figure", {}).get("caption"):
        yield _cell(f"<small>{caption}</small>", "-")


def count(deck: NotebookNode) -> int:
    """Return the number of slides.

    Args:
        deck: From `cut`.
    """
    return sum(cell.metadata.slideshow.slide_type in STARTS for cell in deck.cells)


def build(out: Path = OUT) -> list[Path]:
    """Write a folder of decks that needs nothing else, not even a network.

    Args:
        out: The folder.

    Raises:
        FileNotFoundError: If a script is not in vendor/.
        ValueError: From `cut`.

    Source: nbconvert's exporter for reveal.js.
    """
    from nbconvert import SlidesExporter

    for name in SCRIPTS:
        if not (VENDOR / name).is_dir():
            raise FileNotFoundError(f"{name} is not in vendor/: run `make vendor` (it needs npm)")
    exporter = SlidesExporter(template_file=str(ROOT / "tools" / "slides.html.j2"),
                              exclude_input=True, exclude_output_prompt=True)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copytree(VENDOR / name, out / "vendor" / name)
    paths, made, items = notebooks(), [], []
    pages = Pages(paths)
    for path in paths:
        deck = cut(read_notebook(path, as_version=4), pages)
        title = deck.cells[0].source.partition("\n")[0].lstrip("# ")
        page, _ = exporter.from_notebook_node(deck, {"metadata": {"name": title}})
        made.append(out / f"{path.stem}.html")
        made[-1].write_text(page, encoding="utf8")
        items.append(f'<li><a href="{made[-1].name}">{title}</a>, {count(deck)} slides')
    (out / "index.html").write_text(
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Slides</title>'
        f"<h1>Slides</h1><ol>{''.join(items)}</ol></html>", encoding="utf8")
    return made


if __name__ == "__main__":
    argparse.ArgumentParser("python -m tools.slides", description="Make slides.").parse_args()
    print(f"{len(build())} decks are ready: open {OUT}/index.html")
