"""Diagrams: SVG files of `chapters/images` that take the color of the page they are on.

An image in an `<img>` does not inherit `currentColor`, so the site gets the drawing itself. LaTeX
takes no SVG: the PDF gets a PNG, made by Chromium, or the description where there is no Chromium.
"""

import html
import re
import shutil
import subprocess
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms.images import ImageConverter


def inlined(svg: str, alt: str) -> str:
    """Return a drawing as a part of a page.

    Args:
        svg: Text of the file.
        alt: What it shows, for readers who cannot see it.
    """
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    named = f'<svg class="bd-diagram" role="img" aria-label="{html.escape(alt, quote=True)}" '
    return svg[svg.index("<svg"):].replace("<svg ", named, 1)


def _diagram(app: Sphinx, image: nodes.image) -> str:
    """Return the drawing of an image, nothing if it is none: a badge has colors of its own."""
    path = Path(app.srcdir, image["uri"])
    svg = path.read_text(encoding="utf8") if path.suffix == ".svg" and path.is_file() else ""
    return svg if "currentColor" in svg else ""


def _inline(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    if app.builder.format != "html":
        return
    for image in list(doctree.findall(nodes.image)):
        if svg := _diagram(app, image):
            drawing = nodes.raw("", inlined(svg, image["alt"]), format="html")
            image.parent.replace(image, drawing)


class ToPng(ImageConverter):
    """Draws an SVG file at three times its size."""

    conversion_rules = [("image/svg+xml", "image/png")]

    def match(self, node: nodes.image) -> bool:
        """Tell whether an image is a diagram that the builder cannot take."""
        return super().match(node) and bool(_diagram(self.app, node))

    def handle(self, node: nodes.image) -> None:
        """Put the PNG in place of the drawing, no larger than on the site."""
        super().handle(node)
        node["width"] = "70%"

    def is_available(self) -> bool:
        """Tell whether there is a Chromium."""
        return shutil.which("chromium") is not None

    def convert(self, _from: str, _to: str) -> bool:
        """Write the PNG.

        Args:
            _from: Path of the drawing.
            _to: Path of the PNG.
        """
        source = Path(_from).resolve()
        size = re.search(r'width="(\d+)" height="(\d+)"', source.read_text(encoding="utf8"))
        if size is None:
            return False
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars",
             f"--window-size={size[1]},{size[2]}", "--force-device-scale-factor=3",
             f"--screenshot={_to}", source.as_uri()], check=True, capture_output=True)
        return Path(_to).is_file()


def setup(app: Sphinx) -> dict:
    """Draw each diagram as its reader can use it."""
    app.connect("doctree-resolved", _inline)
    app.add_post_transform(ToPng)
    return {"parallel_read_safe": True}
