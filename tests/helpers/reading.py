"""What can be counted of how a chapter reads.

    python tests/helpers/reading.py [PART_OF_A_NAME...]      print the counts
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import textstat
from bs4 import BeautifulSoup
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
# Figures drawn by hand, not by a cell: badges are no diagrams.
DIAGRAM = re.compile(r"\]\(images/(?!open-in-colab)[\w-]+\.svg\)")
# What is no prose: lines of directives, targets, images; code, formulas, comments; citations.
LINES = re.compile(r"^(:{3,}.*|:[\w-]+:.*|\([\w-]+\)=|!?\[.*\]\(images/.*)$", re.MULTILINE)
BLOCKS = re.compile(r"```.*?```|\$\$.*?\$\$(?: \([\w-]+\))?|<!--.*?-->", re.DOTALL)
ROLE = re.compile(r"\{(?:cite|eq)(?::\w)?\}`[^`]*`|\{\w+\}`([^`<]*?)\s*(?:<[^`]*>)?`")


# Words that no chapter needs: of an older prose, fractions in words, and whom nobody means.
BANNED = re.compile(
    r"\b(pictures?|pictured|unmarked|marked (?:images?|samples?|texts?|inputs?)|sleepers?|shall|"
    r"per cent|he|his|him|(?:an?|one|two|three|four|five|six|seven|eight|nine) (?:third|quarter|"
    r"fifth|sixth|seventh|eighth|ninth|tenth|twentieth|hundredth)s? (?:of|to)|"
    r"in square brackets stands?)\b", re.IGNORECASE)


def prose(text: str) -> str:
    """Return a text cell without what is no prose; tables stay."""
    text = LINES.sub("", text)
    return ROLE.sub(r"\1", BLOCKS.sub("", text))


def paragraphs(text: str) -> list[str]:
    """Return paragraphs and list items as a reader sees them, without headings and tables."""
    html = MarkdownIt().enable("table").render(re.sub(r"\$[^$\n]+\$", "x", prose(text)))
    page = BeautifulSoup(html, "html.parser")
    for code in page.find_all("code"):
        code.replace_with("x")
    return [" ".join(p.get_text().split()) for p in page.find_all(["p", "li"])
            if not p.find(["p", "li"])]


def hidden(cell: dict[str, Any]) -> bool:
    return any(t in ("hide-input", "hide-cell", "remove-input", "remove-cell")
               for t in cell["metadata"].get("tags", ()))


def removed(cell: dict[str, Any]) -> bool:
    return any(t in ("remove-output", "remove-cell") for t in cell["metadata"].get("tags", ()))


def columns(cell: dict[str, Any]) -> list[int]:
    """Return the width of each table that a cell shows, with its index; none that has filters."""
    html = ["".join(o["data"]["text/html"]) for o in cell["outputs"]
            if "text/html" in o.get("data", {})] if "outputs" in cell else \
        [MarkdownIt().enable("table").render(prose("".join(cell["source"])))]
    tables = [t for h in html for t in BeautifulSoup(h, "html.parser").find_all("table")]
    return [max(len(line.find_all(["th", "td"])) for line in t.find_all("tr")) for t in tables
            if not t.find(attrs={"data-filter": True})]  # of such a table a reader chooses


def count(path: Path) -> dict[str, Any]:
    """Return what can be counted of a chapter.

    Args:
        path: The notebook.
    """
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    texts = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    code = [c for c in cells if c["cell_type"] == "code"]
    lines = [len([x for x in "".join(c["source"]).splitlines() if x.strip()]) for c in code]
    shown = [c for c in cells if not (c["cell_type"] == "code" and removed(c))]
    printed = ["".join(o.get("text", "")) for c in code if not removed(c) for o in c["outputs"]]
    every = [p for text in texts for p in paragraphs(text)]
    sentences = [p for p in every if len(p.split()) > 5]
    widths = [w for c in shown for w in columns(c)]
    return {
        "words": sum(len(re.findall(r"\S*[A-Za-z]\S*", prose(t))) for t in texts),
        "visible lines": sum(n for c, n in zip(code, lines) if not hidden(c)),
        "longest visible": max(n for c, n in zip(code, lines) if not hidden(c)),
        "tables": len(widths),
        "columns": max(widths, default=0),
        "first result": next((1 + sum(not hidden(x) for x in code[:k]) for k, c in enumerate(code)
                              if c["outputs"] and not removed(c)), len(code)),
        "True lines": sum(len(re.findall(r": True$", p, re.MULTILINE)) for p in printed),
        "banned": sum(len(BANNED.findall(p)) for p in every),
        "diagrams": sum(len(DIAGRAM.findall(t)) for t in texts),
        "longest paragraph": max(len(p.split()) for p in every),
        "grade": round(textstat.flesch_kincaid_grade(" ".join(
            p if p[-1] in ".?!:" else f"{p}." for p in sentences)), 1),
    }


if __name__ == "__main__":
    for name in sorted((ROOT / "chapters").glob("[0-9]*.ipynb")):
        if not sys.argv[1:] or any(part in name.name for part in sys.argv[1:]):
            print(name.stem, count(name))
