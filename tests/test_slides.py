"""Slides are cut from the chapters by the cells' metadata."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import book, slides

TEXT = """(ch-x)=
# A title

First sentence, about it all. It is by Gu et al. {cite:p}`gu2017badnets`. Which are

- one;
- two, as {eq}`eq-x` says.

$$ a = b $$ (eq-x)

| a | b |
| - | - |
| 1 | 2 |

:::{prf:algorithm} Do it
:label: alg-x

1. Do.
:::

:::{exercise}
:label: ex-x

Not shown.
:::

:::{admonition} Ethics
:class: warning
Take care.
:::
"""


@pytest.fixture(scope="module")
def pages():
    return slides.Pages(book.notebooks())


def test_units_of_a_text():
    found = list(slides.units(TEXT))
    assert [unit.kind for unit in found] == [
        "heading", "sentence", "sentence", "sentence", "item", "item", "block", "block", "block",
        "heading", "sentence"]
    assert found[6] == ("block", "$$ a = b $$", "eq-x")
    assert found[8].text == "**Algorithm: Do it**\n\n1. Do."
    assert "Not shown" not in str(found) and ":class:" not in str(found)


def test_what_is_shown_is_named_by_its_beginning():
    def texts(*show):
        return [unit.text for unit in slides.chosen(TEXT, show)]

    assert texts("two,") == ["- two, as {eq}`eq-x` says."]
    assert texts(["Which", "two"], "---", "$$ a")[1:] == [
        "- one;", "- two, as {eq}`eq-x` says.", "", "$$ a = b $$"]
    assert len(slides.chosen(TEXT, None)) == 11
    for gone in (["Not shown."], ["two", "one"], [["two", "one"]]):  # the order is the page's
        with pytest.raises(ValueError, match="nothing on the page begins with"):
            slides.chosen(TEXT, gone)


@pytest.mark.parametrize(("myst", "plain"), [
    ("{cite:t}`gu2017badnets` and {cite:p}`kurita2020weight`",
     "Gu et al. 2017 and (Kurita et al. 2020)"),
    ("{cite:p}`calinski1974dendrite`", "(Caliński and Harabasz 1974)"),
    ("{doc}`../02_measuring`, {ref}`Chapter 2 <ch-measuring>`, {ref}`ch-measuring`",
     "chapter 2, Chapter 2, the chapter"),
    ("{term}`AUROC` {term}`rates <rate>` {numref}`fig-x` {eq}`eq-cacc`",
     "AUROC rates the figure (2.2)"),
])
def test_roles_become_words(myst, plain, pages):
    assert pages.plain(myst) == plain


def deck_of(pages, *cells):
    return slides.cut(new_notebook(cells=cells), pages)


def shown(kind="slide", **more):
    return {"slideshow": {"slide_type": kind, **more}}


def test_a_deck(pages):
    output = new_output("stream", text="42")
    deck = deck_of(
        pages, new_markdown_cell("# A title\n\nSkipped.\n\n- an item"),
        new_code_cell("6 * 7", outputs=[output], metadata=shown()),
        new_code_cell("7 * 6", outputs=[output], metadata=shown("-", code=True)),
        new_markdown_cell("Lead.\n\n- a;\n- b.\n\nand more. Last. No.",
                          metadata=shown("-", show=[["Lead", "Last"], "---", "No."])),
        new_code_cell("8", outputs=[output]))
    assert [(c.metadata.slideshow.slide_type, c.source) for c in deck.cells] == [
        ("slide", "## A title"), ("-", "6 * 7"), ("-", "```python\n7 * 6\n```"), ("-", "7 * 6"),
        ("-", "Lead.\n\n- a;\n\n- b.\n\nand more.\n\n- Last."), ("slide", "## A title\n\n- No.")]
    assert slides.count(deck) == 2


def test_bad_metadata_name_the_cell(pages):
    cell = new_markdown_cell("Text.", id="c99-001", metadata=shown("page"))
    with pytest.raises(ValueError, match="cell c99-001: unknown slide_type 'page'"):
        deck_of(pages, cell)
    cell.metadata = shown(show=["Word"])
    with pytest.raises(ValueError, match="cell c99-001: nothing on the page begins with 'Word'"):
        deck_of(pages, cell)


def test_a_folder_of_slides_asks_no_other_host(tmp_path, monkeypatch):
    for name in slides.SCRIPTS:
        (tmp_path / "vendor" / name).mkdir(parents=True)
    path = tmp_path / "01_x.ipynb"
    slider = "<input type=range><script>let moved = 1;</script>"
    nbformat.write(new_notebook(cells=[
        new_markdown_cell("# A title\n\n$$ a $$", metadata=shown()),
        new_code_cell("secret()", metadata=shown("-"), outputs=[new_output(
            "execute_result", {"text/html": slider}, execution_count=1)])]), path)
    monkeypatch.setattr(slides, "VENDOR", tmp_path / "vendor")
    monkeypatch.setattr(slides, "notebooks", lambda: [path])
    made = slides.build(tmp_path / "out")
    page = made[0].read_text()
    assert "A title" in page and "let moved = 1;" in page and "secret" not in page
    asked = re.findall(r"""(?:src|href)=["']?([^"' >]+)|@import\s+(\S+)|url\((.*?)\)""", page)
    assert len(asked) >= 4 and all(x.startswith(("vendor/", "#")) for x in map("".join, asked))
    assert "https:" not in page
    assert 'href="01_x.html">A title</a>, 1 slides' in (tmp_path / "out/index.html").read_text()
    (tmp_path / "vendor/reveal.js").rmdir()
    with pytest.raises(FileNotFoundError, match=r"reveal.js is not in vendor/: run `make vendor`"):
        slides.build(tmp_path / "out")


@pytest.mark.parametrize("path", book.notebooks(), ids=lambda path: path.stem)
def test_each_chapter_has_its_slides(path, pages):
    notebook = nbformat.read(path, as_version=4)
    deck = slides.cut(notebook, pages)
    assert 8 <= slides.count(deck) <= 20
    title = re.search(r"^# (.+)$", notebook.cells[0].source, re.MULTILINE)[1]
    assert deck.cells[0].source.split("\n")[0] == f"## {title}"
    for cell in deck.cells:
        begins = cell.metadata.slideshow.slide_type in slides.STARTS
        assert not begins or re.match(r"## \S", cell.source), cell
        if cell.cell_type == "markdown" and "```" not in cell.source:
            assert not re.search(r":::|\{[\w:]+\}`|\(\?\)|^\([\w-]+\)=", cell.source), cell
