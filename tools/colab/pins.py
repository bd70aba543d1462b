"""Print tools/colab/colab.txt with the versions of a newer list of Colab's.

    python -m tools.colab.pins pip-freeze.txt > newer.txt

The list is pip-freeze.txt of github.com/googlecolab/backend-info.
"""

import re
import sys
from pathlib import Path


def plain(name: str) -> str:
    """Return the name of a package as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def newer(pins: str, published: str) -> str:
    """Return `pins` with the versions of the `published` list; what it lacks stays as it is."""
    # A package is listed as NAME==VERSION, or as NAME @ URL/NAME-VERSION%2BBUILD-....whl.
    found = {plain(name): version for name, version in re.findall(
        r"^([\w.-]+)(?:==| @ \S*/[A-Za-z][\w.]*-)([\w.]+)", published, re.MULTILINE)}
    return re.sub(r"^([\w.-]+)(==\S+)?$",
                  lambda line: (f"{line[1]}=={found[plain(line[1])]}"
                                if plain(line[1]) in found else line[0]),
                  pins, flags=re.MULTILINE)


if __name__ == "__main__":
    here = Path(__file__).with_name("colab.txt").read_text(encoding="utf8")
    print(newer(here, Path(sys.argv[1]).read_text(encoding="utf8")), end="")
