"""The cells to play with, without a browser: what their functions return and what follows what."""

import base64
import io
import re

import pytest
import torch
from ipywidgets import BoundedIntText, Dropdown, FloatSlider, IntSlider, Text
from PIL import Image

from bdutils import tryit
from bdutils.tryit import TryIt, answers, bars, image


class Fixed:
    """A model that always says the same."""

    def __init__(self, *logits):
        self.logits = lambda inputs: torch.tensor([logits] * len(inputs))


MODELS = {"clean": Fixed(0.0, 0.0, -9.0), "bad & worse": Fixed(1.0, 3.0, 2.0)}


def test_answers_are_the_models_own(tiny):
    found = answers({"tiny": tiny}, ["a good film"], ("no", "yes"))
    assert [answer[:2] for answer in found] == [("tiny", "no"), ("tiny", "yes")]
    assert [answer[2] for answer in found] == tiny.logits(["a good film"])[0].tolist()
    assert sum(answer[3] for answer in found) == pytest.approx(1)
    with pytest.raises(ValueError, match="one input at a time, not 2"):
        answers({"tiny": tiny}, ["one", "two"], ("no", "yes"))


def test_bars_are_a_table_of_the_likeliest_classes():
    table = bars(answers(MODELS, ["x"], ("<a>", "b", "c")), top=2)
    lines = [re.sub(r"<[^>]+>", " ", line).split() for line in table.split("<tr>")[2:]]
    assert lines == [["clean", "&lt;a&gt;", "0.00", "50.0%"], ["clean", "b", "0.00", "50.0%"],
                    ["bad", "&amp;", "worse", "b", "3.00", "66.5%"],
                    ["bad", "&amp;", "worse", "c", "2.00", "24.5%"]]
    assert table.count('scope="row"') == 4 and "width: 66.5%" in table


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_keeps_its_pixels_and_has_a_description(channels):
    pixels = torch.randint(0, 256, (channels, 4, 5), dtype=torch.uint8)
    shown = image(pixels, 'a "coat"')
    opened = Image.open(io.BytesIO(base64.b64decode(re.search("base64,([^\"]+)", shown)[1])))
    assert opened.size == (5, 4) and 'alt="a &quot;coat&quot;"' in shown
    assert list(opened.tobytes()) == pixels.permute(1, 2, 0).flatten().tolist()


def show(sentence, place, attack):
    return f"{sentence.split()[place]} {attack}"


def play():
    return TryIt(show, sentence="one two three", place=(0, 4), attack=["badnets", "wave"])


def test_the_result_follows_the_controls():
    sentence, (place, slider), attack, result = [
        getattr(child, "children", child) for child in play().widget().children]
    assert [type(c) for c in (sentence, place, slider, attack)] == [
        Text, BoundedIntText, IntSlider, Dropdown]
    assert [c.description for c in (sentence, place, attack)] == ["sentence", "place", "attack"]
    assert not sentence.continuous_update and not slider.continuous_update
    assert result.value == "three badnets"
    attack.value = "wave"
    slider.value = 1
    assert place.value == 1 and result.value == "two wave"
    place.value = 0
    sentence.value = "four"
    assert result.value == "four wave"
    place.value = 400
    assert slider.value == 4
    assert result.value == "IndexError: list index out of range"


def test_a_page_gets_a_line_of_text_and_no_widget(capsys, monkeypatch):
    monkeypatch.setenv("BDUTILS_QUIET", "1")
    monkeypatch.setattr(tryit.TryIt, "widget", None)
    play()._ipython_display_()
    assert capsys.readouterr().out == "needs a kernel; to change: sentence, place, attack\n"


def test_a_reader_gets_the_widget(monkeypatch):
    monkeypatch.delenv("BDUTILS_QUIET", raising=False)
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    play()._ipython_display_()
    assert len(shown[0].children) == 4


def test_numbers_with_a_fraction_get_a_box_too():
    labeled, result = TryIt(lambda share: f"{share}", share=(0.0, 1.5, 0.25)).widget().children
    box, slider = labeled.children
    assert type(slider) is FloatSlider and (box.min, box.max, box.step) == (0, 1.5, 0.25)
    box.value = 1.25
    assert result.value == "1.25" and not slider.readout
