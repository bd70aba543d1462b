"""How a chapter reads, as far as it can be counted; what cannot be, people read."""

import json

import pytest
from helpers import reading

CHAPTERS = sorted((reading.ROOT / "chapters").glob("[0-9]*.ipynb"))
# At most so much; `diagrams` at least. A method's chapter has two diagrams.
MOST = {"words": 3000, "visible lines": 300, "longest visible": 40, "tables": 6,
        "columns": 6,  # five and their index
        "first result": 8, "True lines": 0, "banned": 0, "longest paragraph": 90, "grade": 10}
METHODS = {"05", "06", "07", "08", "09", "11", "12"}


@pytest.fixture
def chapter(tmp_path):
    """Return a function that counts a chapter of the given cells."""
    def counted(*cells):
        path = tmp_path / "chapter.ipynb"
        result = {"cell_type": "code", "metadata": {}, "source": "print(1)",
                  "outputs": [{"output_type": "stream", "text": "1\n"}]}
        text = {"cell_type": "markdown", "metadata": {}, "source": "The model learns a word."}
        path.write_text(json.dumps({"cells": [*cells, text, result]}))
        return reading.count(path)
    return counted


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_written_for_its_reader(path):
    counts = reading.count(path)
    assert {name: n for name, n in counts.items() if n > MOST.get(name, n)} == {}
    assert counts["diagrams"] >= 1 + (path.name[:2] in METHODS)


@pytest.mark.parametrize(("name", "cell"), [
    ("words", {"cell_type": "markdown", "source": "word " * 3001}),
    ("longest paragraph", {"cell_type": "markdown", "source": "- " + "word " * 91}),
    ("visible lines", {"cell_type": "code", "source": "x = 1\n" * 301, "outputs": []}),
    ("columns", {"cell_type": "markdown", "source": "|a" * 7 + "|\n" + "|-" * 7 + "|"}),
    ("True lines", {"cell_type": "code", "source": "x",
                    "outputs": [{"output_type": "stream", "text": ["it works: True\n"]}]}),
    ("banned", {"cell_type": "markdown", "source": "It takes a tenth of the marked pictures."}),
    ("grade", {"cell_type": "markdown", "source": "Notwithstanding considerable methodological "
               "heterogeneity, investigators consistently characterize representational "
               "vulnerabilities. " * 9}),
])
def test_what_is_too_much_is_counted(chapter, name, cell):
    assert chapter()[name] <= MOST[name] < chapter({"metadata": {}, **cell})[name]


def test_what_is_folded_and_what_is_no_prose_does_not_count(chapter):
    cells = [{"cell_type": "code", "metadata": {"tags": ["hide-input"]}, "source": "x = 1\n" * 99,
              "outputs": []},
             {"cell_type": "markdown", "metadata": {}, "source": (
                 "(ch-x)=\n:::{note}\n:class: dropdown\n$$ a = b $$ (eq-x)\n```\ncode here\n```\n"
                 "{cite:t}`he2021someone`\n:::")}]
    assert chapter(*cells) == chapter()


def test_diagrams_are_counted_and_badges_are_not(chapter):
    cell = {"cell_type": "markdown", "metadata": {}, "source": (
        "[![Open](images/open-in-colab.svg)](https://colab)\n\n![Who sees it.](images/roles.svg)")}
    assert chapter(cell)["diagrams"] == 1
