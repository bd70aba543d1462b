"""The built pages, for the tests that read them and for those that open them in a browser."""

import functools
import os
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"


def contents() -> list[str]:
    """Return the files that the table of contents names, in its order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(c["file"] for part in toc["parts"] for entry in part["chapters"]
                           for c in (entry, *entry.get("sections", ())))]


PAGES = [f"{name}.html" for name in (*contents(), "search", "genindex", "py-modindex")]


def missing(what: str) -> None:
    """Skip a test that lacks something; `.ci/run` demands that nothing is lacking."""
    (pytest.fail if os.environ.get("BDUTILS_BROWSER") == "required" else pytest.skip)(what)


@functools.cache
def page(name: str) -> BeautifulSoup:
    if not (HTML / name).is_file():
        missing(f"{name} is not built: run `make book` first")
    return BeautifulSoup((HTML / name).read_bytes(), "html.parser")
