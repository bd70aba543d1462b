"""The spelling of all prose, American, after Hunspell's dictionary and `words.txt`."""

import re
from pathlib import Path

import pytest
import spylls.hunspell
from bs4 import BeautifulSoup, NavigableString
from helpers.pages import PAGES, ROOT, page
from markdown_it import MarkdownIt

pytestmark = pytest.mark.slow

WORDS = Path(__file__).with_name("words.txt")
# No prose, or not ours: code, its titles and what it prints, formulas, signatures, titles of
# cited papers.
SKIPPED_TAGS = set("pre code script style".split())
INLINE = {"a", "em", "i", "span", "strong"}
SKIPPED_CLASSES = {"math", "cell_input", "cell_output", "collapsed", "expanded", "citation", "sig",
                   "headerlink"}
FILES = sorted(path for path in ROOT.glob("*.md"))


def prose(node) -> str:
    """Return the text of a part of a page without what is no prose."""
    if isinstance(node, NavigableString):
        return "" if type(node) is not NavigableString else str(node)
    if node.name in SKIPPED_TAGS or SKIPPED_CLASSES & set(node.get("class", ())) \
            or "bibliography.html" in node.get("href", "") \
            or node.name == "strong" and node.find_parent("dl", class_="field-list"):
        return " "  # in the last two lines: names of authors, of parameters and of errors
    text = "".join(map(prose, node.children))
    return text if node.name in INLINE else f"{text} "


def words(node) -> set[str]:
    return set(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", prose(node).replace("’", "'")))


@pytest.fixture(scope="module")
def dictionary():
    folder = Path(spylls.hunspell.__file__).parent / "data" / "en"
    return spylls.hunspell.Dictionary.from_files(str(folder / "en_US"))


def forms(word: str) -> set[str]:
    """Return the spellings of which the word list has one: it may start a sentence or own."""
    word = word.removesuffix("'s")
    return {word, word[0].lower() + word[1:]}


def unknown(found: set[str], dictionary, own: set[str]) -> set[str]:
    return {word for word in found if not forms(word) & own
            and not any(map(dictionary.lookup, forms(word)))}


def test_prose_is_spelled_right(dictionary):
    own = WORDS.read_text().split()
    assert own == sorted(set(own), key=lambda word: (word.lower(), word)), "sort words.txt"
    used = {name: words(page(name).article) for name in PAGES
            if name.startswith("chapters/") and name != "chapters/status.html"}  # names machines
    for path in FILES:
        text = MarkdownIt().enable("table").render(path.read_text(encoding="utf8"))
        used[path.name] = words(BeautifulSoup(text, "html.parser"))
    found = {name: wrong for name, some in used.items()
             if (wrong := unknown(some, dictionary, set(own)))}
    assert found == {}, "correct these words, or add them to tests/words.txt"
    every = {form for some in used.values() for word in some for form in forms(word)}
    assert [word for word in own if word not in every] == [], "nothing uses these words"


@pytest.mark.parametrize("word", ["colour", "defence", "behaviour", "recieve", "spoilt"])
def test_a_misspelled_or_british_word_is_noticed(dictionary, word):
    text = BeautifulSoup(f"<p>A {word}, <code>x{word}</code>, a model’s.</p>", "html.parser")
    assert unknown(words(text), dictionary, set()) == {word}
