"""One concept has one name, the field's, in code, keys, headings and what the pages show."""

import pytest
from helpers import vocabulary


@pytest.mark.parametrize("path", vocabulary.files(),
                         ids=lambda p: str(p.relative_to(vocabulary.ROOT)))
def test_the_fields_words(path):
    assert not vocabulary.of_file(path)


@pytest.mark.parametrize("source", ["pictures = 1", "def f(slope): pass", "x = {'patch': 1}",
                                    "class RefusedRow: pass", "a.twin"])
def test_a_word_of_our_own_is_noticed(source):
    assert list(vocabulary.in_code(source))


def test_headings_and_outputs_are_read():
    assert list(vocabulary.in_heading("# a\n\n## The marked ones"))
    cell = {"outputs": [{"text": ["all refused, 5 %\n"]}]}
    assert list(vocabulary.shown({"cells": [cell]}))
