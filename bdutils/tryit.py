"""Cells to play with: controls above a result that follows them, where there is a kernel."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from .models.image import ImageClassifier
from .models.text import Classifier
from .plotting import BLUE
from .roles import Images

if TYPE_CHECKING:
    from ipywidgets import VBox, Widget


class TryIt:
    """Controls above a result that follows them.

    It shows as widgets where somebody can use them. With BDUTILS_QUIET, as when the outputs of a
    page are made, it is one line of text: a stored widget does nothing, and the page would ask
    another host for its script.
    """

    def __init__(self, show: Callable[..., str], **controls: object) -> None:
        """Keep the function and what it is given.

        Args:
            show: Maps the controls' values to HTML.
            **controls: For each parameter of `show` a text, a list of choices, or the lowest and
                highest number (with the step, if any).
        """
        self.show, self.controls = show, controls

    def __repr__(self) -> str:
        """Say what there is to change, where it can be."""
        return f"needs a kernel; to change: {', '.join(self.controls)}"

    def widget(self) -> VBox:
        """Return the controls and the result as one widget of ipywidgets."""
        from ipywidgets import HTML, VBox, interactive

        result = HTML()
        parts = {name: interactive.widget_from_abbrev(kind)
                 for name, kind in self.controls.items()}
        shown = [_labeled(part, name.replace("_", " ")) for name, part in parts.items()]

        def follow(change: object = None) -> None:
            try:
                result.value = self.show(**{name: part.value for name, part in parts.items()})
            except Exception as error:  # a callback's error would end in a log that nobody reads
                result.value = html.escape(f"{type(error).__name__}: {error}")

        for part in parts.values():
            part.observe(follow, "value")
        follow()
        return VBox([*shown, result])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if os.environ.get("BDUTILS_QUIET"):
            print(self)
        else:
            display(self.widget())


def _labeled(part: Widget, label: str) -> Widget:
    """Label a control; a slider gets a box for its number, which works without a mouse too."""
    from ipywidgets import BoundedFloatText, BoundedIntText, HBox, IntSlider, link

    if hasattr(part, "continuous_update"):  # answer when a word is written, not at each key
        part.continuous_update = False
    named = part
    if hasattr(part, "readout"):
        kind = BoundedIntText if isinstance(part, IntSlider) else BoundedFloatText
        named = kind(part.value, min=part.min, max=part.max, step=part.step)
        link((named, "value"), (part, "value"))
        part.readout = False
    named.description = label
    named.style.description_width = "initial"
    named.layout.width = "40em" if named is part else "14em"
    return part if named is part else HBox([named, part])


def answers(models: Mapping[str, Classifier | ImageClassifier],
            inputs: Sequence[str] | Images,
            names: Sequence[str]) -> list[tuple[str, str, float, float]]:
    """Return what each model says of one input: model, class, logit, probability.

    Args:
        models: By name.
        inputs: One text or image.
        names: Of the classes.

    Raises:
        ValueError: For several inputs.
    """
    if len(inputs) != 1:
        raise ValueError(f"one input at a time, not {len(inputs)}")
    found = []
    for model, classifier in models.items():
        logits = classifier.logits(inputs)[0]
        found += [(model, name, logit, p) for name, logit, p in zip(
            names, logits.tolist(), logits.softmax(0).tolist(), strict=True)]
    return found


def bars(found: list[tuple[str, str, float, float]], top: int = 3) -> str:
    """Return answers as a table in HTML, with a bar for each probability.

    Args:
        found: From `answers`.
        top: Classes that are shown for each model, the likeliest.
    """
    cells = []
    for model in dict.fromkeys(answer[0] for answer in found):
        likely = sorted((answer for answer in found if answer[0] == model),
                        key=lambda answer: -answer[3])
        for _, name, logit, p in likely[:top]:
            cells.append(
                f'<tr><th scope="row">{html.escape(model)}</th><td>{html.escape(name)}</td>'
                f'<td style="text-align: right">{logit:.2f}</td>'
                f'<td style="text-align: right">{p:.1%}</td><td style="width: 12em">'
                f'<div style="background: {BLUE}; height: 1em; width: {p:.1%}"></div></td></tr>')
    head = "".join(f'<th scope="col">{name}</th>'
                   for name in ("model", "class", "logit", "probability", ""))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody></table>"


def image(pixels: Tensor, alt: str, width: int = 168) -> str:
    """Return a stored image as HTML, blown up so that its pixels show.

    Args:
        pixels: uint8 (1 or 3, H, W).
        alt: What it shows, for those who cannot see it.
        width: On the screen.
    """
    file, array = io.BytesIO(), pixels.permute(1, 2, 0).squeeze(2).numpy()
    Image.fromarray(array).save(file, "png")
    return (f'<img alt="{html.escape(alt, quote=True)}" width="{width}" '
            'style="image-rendering: pixelated" '
            f'src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">')
