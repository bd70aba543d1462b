"""One look for all figures, and a slider and a table that need no kernel."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from PIL import Image

# Okabe and Ito's palette: told apart by color-blind readers, and in gray.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, YELLOW, BLACK = "#56B4E9", "#CC79A7", "#F0E442", "#000000"
PALETTE = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, YELLOW, BLACK)


def use_style() -> None:
    """Set the book's style for all figures that follow: seaborn's theme in our palette.

    Source: colors of Okabe and Ito.
    """
    # The font comes with matplotlib: figures look the same on every machine.
    sns.set_theme(style="ticks", palette=PALETTE, font="DejaVu Sans", font_scale=10 / 12, rc={
        "figure.figsize": (6.4, 3.4), "figure.dpi": 110, "savefig.bbox": "tight",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.3, "axes.axisbelow": True, "font.size": 10, "legend.frameon": False,
        "figure.constrained_layout.use": True,
    })


class Frames:
    """Images behind one slider, all stored in the page.

    It shows as plain HTML with a few lines of script, so it works on the site, from a file, on
    Colab and without a kernel. Its text form names the states; nbval compares that.
    """

    def __init__(self, images: Sequence[bytes], alts: Sequence[str], values: Sequence[object],
                 label: str, start: int) -> None:
        """Keep the images; `frames` makes them."""
        self.images, self.alts, self.values = list(images), list(alts), list(map(str, values))
        self.label, self.start = label, start

    def __repr__(self) -> str:
        """Name the label and the states."""
        return f"slider over {self.label}: {', '.join(self.values)}"

    def _repr_png_(self) -> bytes:
        """Return the state that shows first, for the PDF."""
        return self.images[self.start]

    def _repr_html_(self) -> str:
        """Return the slider as HTML that needs no library."""
        # Of the images too: a page may have two sliders over the same values.
        uid = "bd-" + hashlib.sha256(b"".join([repr(self).encode(), *self.images])).hexdigest()[:8]
        images = "".join(
            f'<img alt="{html.escape(alt, quote=True)}" style="max-width:100%"'
            f'{"" if i == self.start else " hidden"} '
            f'src="data:image/png;base64,{base64.b64encode(image).decode()}">'
            for i, (image, alt) in enumerate(zip(self.images, self.alts, strict=True)))
        return (
            f'<div class="bd-slider" id="{uid}"><label>{html.escape(self.label)}: '
            f'<input type="range" min="0" max="{len(self.values) - 1}" value="{self.start}" '
            f'aria-valuetext="{html.escape(self.values[self.start], quote=True)}"> '
            f"<output>{html.escape(self.values[self.start])}</output></label>"
            f"<div>{images}</div><script>(() => {{"
            f'const box = document.getElementById("{uid}");'
            f"const values = {json.dumps(self.values)};"
            'const input = box.querySelector("input");'
            'input.addEventListener("input", () => {'
            'box.querySelectorAll("img").forEach((image, i) => {'
            "image.hidden = i != input.value; });"
            'box.querySelector("output").textContent = values[input.value];'
            'input.setAttribute("aria-valuetext", values[input.value]);'
            "});})();</script></div>")


def small(image: bytes) -> bytes:
    """Return an image with 256 colors at most, which is what a figure needs.

    Args:
        image: A PNG.

    Returns:
        A PNG of a third of the size, or less.
    """
    found = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").quantize(256).save(found, "png", optimize=True)
    return found.getvalue()


def frames(draw: Callable[[object], str], values: Sequence[object], label: str,
           start: int = 0) -> Frames:
    """Draw one image per value and put them behind a slider.

    Args:
        draw: Draws one state on the current figure and returns its description for readers who
            cannot see it.
        values: The states, in order, 2 or more.
        label: What the slider changes.
        start: Index of the state that shows first.

    Raises:
        ValueError: For fewer than two states.
    """
    if len(values) < 2:
        raise ValueError("a slider needs at least two states")
    images, alts = [], []
    for value in values:
        plt.figure()
        alts.append(draw(value))
        buffer = io.BytesIO()
        plt.savefig(buffer, format="png", dpi=100)
        plt.close()
        images.append(small(buffer.getvalue()))
    return Frames(images, alts, values, label, start)


class SortableTable:
    """A table that the site lets its readers sort and filter; elsewhere and on paper it is plain.

    The site does so with the library simple-datatables, for tables of the class `bd-sortable`.
    """

    def __init__(self, shown: pd.DataFrame, order: pd.DataFrame, caption: str,
                 filters: Sequence[str] = ()) -> None:
        """Keep what is shown, numbers of the same shape by which it is sorted, and the columns
        that readers can filter by one of their values.
        """
        if shown.shape != order.shape:
            raise ValueError(f"{shown.shape} cells cannot be sorted by {order.shape} numbers")
        self.shown, self.order, self.caption = shown, order, caption
        self.filters = tuple(filters)

    def __repr__(self) -> str:
        """Return the cells as text."""
        return self.shown.to_string(index=False)

    def _repr_html_(self) -> str:
        """Return a plain table; each cell says by what it is sorted."""
        head = "".join(f"<th{' data-filter' if name in self.filters else ''}>"
                       f"{html.escape(str(name))}</th>" for name in self.shown)
        rows = "".join("<tr>" + "".join(
            f'<td data-order="{html.escape(str(key), quote=True)}">{html.escape(str(text))}</td>'
            for text, key in zip(texts, keys, strict=True)) + "</tr>"
            for texts, keys in zip(self.shown.values, self.order.values, strict=True))
        return ('<div style="overflow-x: auto"><table class="dataframe bd-sortable">'
                f"<caption>{html.escape(self.caption)}</caption>"
                f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>")
