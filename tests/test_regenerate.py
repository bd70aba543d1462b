"""Cells of the comparison, made anew by the command that their record gives."""

import os
import shlex
import subprocess
import sys

import pytest

from bdutils.experiments import results

CELLS = ["images/badnets-rate0.1-seed0", "filters/badnets-rate0.1-seed0-strip"]


def interval(cell: str) -> tuple[float, float]:
    """Return where the ASR of a cell lies over its three seeds, with their 95% intervals."""
    study, name = cell.split("/")
    rates = [results.read(results.FOLDER / study / f"{name.replace('seed0', f'seed{seed}')}.json")
             ["metrics"]["asr"] for seed in (0, 1, 2)]
    return min(rate["low"] for rate in rates), max(rate["high"] for rate in rates)


def lands(value: float, cell: str) -> bool:
    """Tell whether an ASR is one of the cell's, up to half a point for another processor."""
    low, high = interval(cell)
    return low - 0.005 <= value <= high + 0.005


@pytest.mark.alone  # after the chapters, which train these victims
@pytest.mark.parametrize("cell", CELLS)
def test_the_command_of_a_record_makes_it_again(cell, tmp_path):
    study, name = cell.split("/")
    python, *rest = shlex.split(results.read(results.FOLDER / f"{cell}.json")["command"])
    assert python == "python"
    subprocess.run([sys.executable, *rest, "--results", str(tmp_path)], check=True,
                   env={**os.environ, "BDUTILS_SCALE": "small"}, timeout=900)
    made = results.read(tmp_path / study / f"{name}.json")
    assert lands(made["metrics"]["asr"]["value"], cell)


@pytest.mark.parametrize("cell", CELLS)
def test_another_result_does_not_land(cell):
    low, high = interval(cell)
    assert high - low < 0.02 and not lands(low - 0.02, cell) and not lands(high + 0.02, cell)
