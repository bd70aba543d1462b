"""The built pages as files: links, sizes, spelling, and what they tell other programs."""

import functools
import re
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from docutils import nodes
from docutils.utils import new_document
from helpers.pages import HTML, PAGES, ROOT, page
from sphinx.addnodes import start_of_file

from tools.sphinx import citation, folds, paper

each_page = pytest.mark.parametrize("name", PAGES)


@functools.cache
def anchors(name: str) -> set[str]:
    return {tag["id"] for tag in page(name).find_all(id=True)}


def broken_link(name: str, link: str) -> str:
    """Return what is wrong with a link of a page, or nothing."""
    parts = urlsplit(link)
    if parts.scheme in ("http", "https"):
        return "" if re.fullmatch(r"[\w.-]+\.\w+(:\d+)?", parts.netloc) else "no such address"
    if parts.scheme:
        return "" if parts.scheme in ("data", "mailto") else "unknown scheme"
    file = (HTML / name).parent.joinpath(unquote(parts.path)).resolve() if parts.path \
        else HTML / name
    if not file.is_file() or not file.is_relative_to(HTML):
        return "no such file"
    target = str(file.relative_to(HTML))
    if parts.fragment and target in PAGES and unquote(parts.fragment) not in anchors(target):
        return "no such place in it"
    return ""


@each_page
def test_links_lead_somewhere(name):
    links = {tag[key] for tag in page(name).find_all(True) for key in ("href", "src", "action")
             if tag.get(key)}
    assert len(links) > 20
    assert {link: why for link in links if (why := broken_link(name, link))} == {}


@pytest.mark.parametrize(("link", "why"), [
    ("nowhere.html", "no such file"), ("../../../etc/passwd", "no such file"),
    ("glossary.html#no-term", "no such place in it"), ("#term-ASR", "no such place in it"),
    ("https:///chapters", "no such address"), ("htp://a.org", "unknown scheme"),
    ("glossary.html#term-ASR", ""), ("#", ""), ("../search.html", ""), ("https://a.org/b", "")])
def test_broken_links_are_noticed(link, why):
    page(PAGES[0])
    assert broken_link("chapters/index.html", link) == why


def test_no_page_is_forgotten_and_none_is_large():
    page(PAGES[0])
    built = {str(path.relative_to(HTML)): path.stat().st_size for path in HTML.rglob("*.html")
             if not path.is_relative_to(HTML / "_static")}
    pages = {name for name in built if not name.startswith("slides/")}  # slides have own tests
    assert pages == {*PAGES, "index.html"}
    assert {name: size for name, size in built.items() if size > 1_500_000} == {}


def test_the_root_leads_to_the_first_page():
    page(PAGES[0])
    assert "url=chapters/index.html" in (HTML / "index.html").read_text()


@each_page
def test_what_a_link_preview_shows(name):
    if not name.startswith("chapters/"):
        return  # an index, not a page of the book
    given = {tag.get("property") or tag.get("name"): tag["content"]
             for tag in page(name).find_all("meta", content=True)}
    assert given["og:title"] and given["og:url"].endswith(name) and given["og:image:alt"]
    base = yaml.safe_load((ROOT / "_config.yml").read_text())["html"]["baseurl"]
    assert (HTML / given["og:image"].removeprefix(base)).is_file()
    assert given["og:description"] == given["description"]
    assert 50 < len(given["description"]) < 300 and "Colab ·" not in given["description"]


def test_the_citation_says_what_the_file_says():
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    text = citation.bibtex(about)
    assert all(about[key] in text for key in ("title", "version", "repository-code"))
    assert "year" not in text
    later = citation.bibtex({**about, "date-released": "2031-02-03", "authors": [
        {"family-names": "Roe", "given-names": "R."}, {"name": "The others"}]})
    assert "year = {2031}" in later and "author = {Roe, R. and {The others}}" in later
    assert text in page("chapters/index.html").get_text()


@pytest.mark.parametrize(("code", "said"), [
    ("import a\nfrom b import c\nuse_style()", "Imports"),
    ("from bdutils.a import b\nfrom bdutils import c", "Imports from bdutils"),
    ("#| export a.b\nimport c", "Imports of bdutils.a.b"),
    ("if 'google.colab' in sys.modules:\n    !git clone x", "Set-up for Colab"),
    ("if 'google.colab' in sys.modules:\n    !pip install x", "A package for Colab"),
    ("!ls\nN = 3\ndef one(x):\n    y = x\n\nclass Two:\n    pass", "Code: N, one(), Two"),
    ("n = 3\ndef one(x):\n    return x", "Code: one()"),
    ("a = b = c, _ = d, e = 3", "Code: a, b, c, ..."),
    ("x = 3\nplt.plot(x)", "Code of the figure"), ("print(1)", "Code")])
def test_a_folded_cell_says_what_is_in_it(code, said):
    assert folds.said(code) == said


@each_page
def test_no_fold_says_only_that_it_is_one(name):
    titles = page(name).select("details.hide > summary")
    assert not [title for title in titles if "code cell source" in title.text]


# ------------------------------------------------------------------------ on the way into the PDF


def test_the_pdf_numbers_what_the_site_numbers():
    """Its chapter 5 is the site's, though a page without a number stands before it."""
    tree = new_document("book")
    for name in ("part", "05"):
        tree += start_of_file("", nodes.section(), docname=name)
    paper._number_chapters(tree, {"part": {}, "05": {"": (5,)}})
    assert [page[0].astext() for page in tree] == [
        r"\setcounter{secnumdepth}{-1}", r"\setcounter{secnumdepth}{2}"]


@pytest.mark.parametrize("mode", ["input", None])
def test_the_pdf_leaves_out_the_code_that_the_site_folds(mode):
    tree = new_document("page")
    cell = nodes.container(nb_element="cell_code", **({"hide_mode": mode} if mode else {}))
    cell += nodes.container("", nodes.Text("code"), nb_element="cell_code_source")
    cell += nodes.container("", nodes.Text("output"), nb_element="cell_code_output")
    tree += cell
    paper._leave_out_folded(tree)
    assert ("code" in tree.astext()) == (mode is None) and "output" in tree.astext()
