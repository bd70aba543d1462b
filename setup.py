"""What goes into a wheel: the package, and the records of `data/` as its folder `_data`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bdutils*"]), "bdutils._data"],
    package_dir={"bdutils._data": "data"},
    package_data={"bdutils": ["templates/*.j2"],
                  "bdutils._data": ["reported.json", "chat.jsonl", "results/*/*.json"]},
)
