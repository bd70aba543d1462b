"""What can be said without Colab's packages; `make colab` runs whole chapters with them."""

import subprocess
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tools.colab import pins
from tools.colab import run as colab

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "chapters/01_five_minutes.ipynb"
COLAB = {r.name: r for line in (ROOT / "tools/colab/colab.txt").read_text().splitlines()
         if line and line[0] != "#" for r in (Requirement(line),)}


def test_colab_has_what_the_package_asks_for():
    """So that installing the book there would change nothing."""
    for text in colab.PROJECT["dependencies"]:
        floor = Requirement(text)
        there = COLAB[floor.name].specifier
        for pin in there:
            assert pin.operator == "==" and floor.specifier.contains(pin.version), text


def test_floors_and_requirements_are_the_same():
    lines = (ROOT / "requirements.txt").read_text().split("\n\n")[0].splitlines()[1:]
    assert lines == colab.PROJECT["dependencies"]
    assert not any(spec.operator == "==" for line in lines for spec in Requirement(line).specifier)


def test_colabs_python_is_supported():
    supported = Requirement(f"python{colab.PROJECT['requires-python']}").specifier
    assert supported.contains(Version("3.13"))


def test_the_set_up_cell_finds_the_book_and_nothing_else():
    wrong, _ = colab.run_all(CHAPTER, cells=1)
    assert wrong == []


def test_a_set_up_cell_that_speaks_or_leaves_things_is_noticed(tmp_path):
    notebook = nbformat.read(CHAPTER, as_version=4)
    setup = next(c for c in notebook.cells if c.cell_type == "code")
    setup.source += "\nprint('hello')\nopen('/content/left', 'w').close()"
    nbformat.write(notebook, tmp_path / "x.ipynb")
    wrong, _ = colab.run_all(tmp_path / "x.ipynb", cells=1)
    assert wrong == ["it left ['left'] in /content", *2 * [r"the set-up cell says 'hello\n'"]]


def test_the_repository_at_the_tag_is_what_lies_here(tmp_path):
    made = colab.github(tmp_path / "github.git", "v9")
    told = subprocess.run(["git", "-C", made, "show", "v9:bdutils/__init__.py"], text=True,
                          capture_output=True, check=True).stdout
    assert told == (ROOT / "bdutils/__init__.py").read_text()


@pytest.mark.parametrize("output, text", [
    ({"output_type": "stream", "name": "stdout", "text": "a\n"}, "a\n"),
    ({"output_type": "stream", "name": "stderr", "text": "a\n"}, ""),
    ({"output_type": "execute_result", "data": {"text/plain": "7"}}, "7"),
    ({"output_type": "display_data", "data": {"text/plain": "x", colab.WIDGET: {}}}, "")])
def test_what_counts_as_said(output, text):
    assert colab.said(nbformat.from_dict({"outputs": [output]})) == text


def test_pins_follow_a_newer_list():
    published = """# made by a program
huggingface-hub==1.30.0
numpy==2.1.3
tokenizers-extra==9
torch @ https://example.org/whl/cu128/torch-2.12.1%2Bcu128-cp313-cp313-linux.whl#sha256=a7
tqdm==4.67.1
"""
    old = ("# torch==1\ntorch==2.11.0\ntokenizers==0.22.2\nhuggingface_hub==1.27.0\n"
            "numpy==2.0\ntqdm")
    assert pins.newer(old, published).splitlines() == [
        "# torch==1", "torch==2.12.1", "tokenizers==0.22.2", "huggingface_hub==1.30.0",
        "numpy==2.1.3", "tqdm==4.67.1"]
