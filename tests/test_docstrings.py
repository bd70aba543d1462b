"""The docstrings of package and tools are in Google style, and say what the signatures have."""

from pathlib import Path

import pytest
from helpers.google import code_lines, faults

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for name in ("bdutils", "tools") for path in (ROOT / name).rglob("*.py"))
GOOD = '''
@dataclass(frozen=True)
class Config:
    """How it is done.

    Raises:
        ValueError: If it cannot be done.
    """

    rate: float = 0.1
    """Share of the samples, 0 to 1."""
    name: ClassVar[str] = "x"

    def paint(self, x, *, seed=0, **changes):
        """Put the trigger on x.

        Args:
            x: (n, C, H, W), which goes on
                in a second line.
            seed: Of the places: all.
            **changes: Fields.

        Returns:
            Triggered images,
            and more: all of them.

        Raises:
            ValueError: For nothing.
            jsonschema.ValidationError: For no record.

        Source: Gu et al. 2017.
        """


def two(a, b):
    """Return both.

    Args:
        a, b: Numbers.
    """
'''


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_docstrings(path):
    assert faults(path.read_text(encoding="utf8")) == []


@pytest.mark.parametrize(("old", "new", "message"), [
    ("    rate: float = 0.1\n    \"\"\"Share of the samples, 0 to 1.\"\"\"\n",
     "    rate: float = 0.1\n", "Config.rate: no text"),
    ("Share of the samples, 0 to 1.", "Share: 0 to 1.", "Config.rate: colon in the first line"),
    ("            seed: Of the places: all.\n", "", "the signature ['x', 'seed', '**changes']"),
    ("            seed: Of", "            sede: Of", "Args has ['x', 'sede', '**changes']"),
    ("**changes: Fields.", "changes: Fields.", "Args has ['x', 'seed', 'changes']"),
    ("a, b: Numbers.", "b, a: Numbers.", "two: Args has ['b', 'a']"),
    ("a, b: Numbers.", "a, b: Numbers", "ends without a period"),
    ("a, b: Numbers.", "a, b:", "an entry of Args is empty"),
    ("            ValueError: For", "            nothing: For", "Raises names 'nothing'"),
    ("    Args:\n        a, b: Numbers.", "    Args: a, b: Numbers.", "not Google style"),
    ("Return both.\n\n", "Return both.\n", "'Args:' is not Google style"),
    ("Source: Gu et al. 2017.", "Source: ours.", "'Source: ours.' is not Google style"),
    ("How it is done.", "How it is done.\n\n    Fields: rate: a share.", "is not Google style"),
])
def test_what_is_wrong_is_found(old, new, message):
    assert faults(GOOD) == []
    assert old in GOOD
    assert any(message in fault for fault in faults(GOOD.replace(old, new, 1)))


def test_lines_of_docstrings_do_not_count():
    cell = 'x = 1\n\ndef f():\n    """Do.\n\n    It.\n    """\n    return """\n\n"""\n'
    assert code_lines(cell) == ["x = 1", "", "def f():", '    return """', "", '"""']
    assert code_lines("%pip install x\ny = 1") == ["%pip install x", "y = 1"]
