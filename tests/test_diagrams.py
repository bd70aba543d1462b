"""The diagrams: one family of SVG files, drawn into the pages."""

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from helpers.pages import page

from tools.sphinx import diagrams

IMAGES = Path(__file__).resolve().parent.parent / "chapters" / "images"
FILES = [path for path in sorted(IMAGES.glob("*.svg")) if "currentColor" in path.read_text()]
SVG = '<?xml version="1.0"?>\n<svg width="4" height="2">\n<!-- for\nauthors -->\n<path/></svg>'


def faults(name: str, text: str) -> list[str]:
    """Return what keeps a diagram from being one of the family."""
    root = ElementTree.fromstring(text)
    _, _, width, height = root.get("viewBox", "0 0 0 0").split()
    found = []
    if width != "440" or (root.get("width"), root.get("height")) != (width, height):
        found.append("not 440 wide, or another size than its viewBox")
    if root.get("fill") != "currentColor" or "svg:root { color:" not in text:
        found.append("text has not the page's color")
    found += [f"id {x} may be on the page twice" for x in re.findall(r'\bid="([^"]+)"', text)
              if not x.startswith(f"{name}-")]
    used = set(re.findall(r"#[0-9A-Fa-f]{6}\b", re.sub(r"<!--.*?-->|<style.*?</style>", "", text,
                                                       flags=re.DOTALL)))
    found += [f"{color} is no color of the book"
              for color in used - {"#D55E00", "#0072B2", "#009E73"}]
    return found + [f"text of size {size} is unreadable on a phone"
                    for size in re.findall(r'font-size="([\d.]+)"', text) if float(size) < 12]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_family(path):
    assert faults(path.stem, path.read_text(encoding="utf8")) == []


@pytest.mark.parametrize(("old", "new", "message"), [
    ('viewBox="0 0 440', 'viewBox="0 0 900', "not 440 wide"),
    ('id="poisoning-tip"', 'id="tip"', "id tip"),
    ('font-size="14"', 'font-size="8"', "size 8"),
    ('fill="currentColor">', 'fill="black">', "page's color"),
    ("#D55E00", "#FF0000", "#FF0000")])
def test_a_stranger_is_noticed(old, new, message):
    text = (IMAGES / "poisoning.svg").read_text(encoding="utf8")
    assert old in text
    assert any(message in fault for fault in faults("poisoning", text.replace(old, new)))


def test_a_drawing_in_the_page_has_a_name_and_no_notes():
    assert diagrams.inlined(SVG, 'a "b" & c') == (
        '<svg class="bd-diagram" role="img" aria-label="a &quot;b&quot; &amp; c" width="4" '
        'height="2">\n<path/></svg>')


@pytest.mark.parametrize("name", ["index", "01_five_minutes", "02_measuring"])
def test_pages_have_diagrams(name):
    drawn = page(f"chapters/{name}.html").select("figure svg.bd-diagram")
    assert drawn and all(len(svg["aria-label"]) > 80 for svg in drawn)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="the PDF has descriptions then")
def test_the_pdf_gets_a_png(tmp_path):
    from PIL import Image

    made = tmp_path / "x.png"
    assert diagrams.ToPng.convert(None, str(IMAGES / "roles.svg"), str(made))
    with Image.open(made) as image:
        darkest, brightest = image.convert("L").getextrema()
        assert image.width == 3 * 440 and darkest < 60 and brightest == 255
