"""What it costs to run a chapter: measured whenever its outputs are made, kept in data/status."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import resource
import sys
from importlib.metadata import version
from pathlib import Path

from bdutils import __version__, scale

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "data" / "status"
# The last thing that a kernel runs; it was started in the folder of the chapters.
MEASURE = f"""\
import sys
sys.path.insert(0, {str(ROOT)!r})
from tools import status
print(status.spent())"""


def spent() -> str:
    """Return what this process has used so far, and what it runs on, as JSON."""
    import torch

    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF,
                                                         resource.RUSAGE_CHILDREN))
    # Afterwards: what these need is not what the chapter needed.
    from bdutils import assets
    from bdutils.experiments.results import processor

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    gpu = torch.cuda.is_available()
    return json.dumps({
        "cpu_seconds": round(sum((own.ru_utime, own.ru_stime, children.ru_utime,
                                  children.ru_stime)), 1),
        "peak_memory_mib": round(own.ru_maxrss * unit / 2**20),
        "peak_gpu_memory_mib": round(torch.cuda.max_memory_reserved() / 2**20) if gpu else None,
        "trained": [name for name in assets.built if not name.startswith("assets/")],
        "threads": torch.get_num_threads(),
        "machine": {
            "processor": processor(), "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
            "gpu": torch.cuda.get_device_name(0) if gpu else None},
        "versions": {"bdutils": __version__, "python": platform.python_version(),
                     "torch": torch.__version__,
                     **{name: version(name) for name in ("transformers", "datasets", "numpy")}},
        "scale": scale()})


def record(chapter: str, sources: list[str], wall_seconds: float, measured: str) -> dict:
    """Make the record of one run of a chapter.

    Args:
        chapter: Name of its file.
        sources: Of its code cells.
        wall_seconds: From the start of the kernel to its last cell.
        measured: From `spent`, by the kernel.
    """
    seeds = {int(seed) for text in sources for seed in re.findall(r"set_seed\((\d+)\)", text)}
    return {"chapter": chapter, "date": datetime.date.today().isoformat(),
            "wall_seconds": round(wall_seconds, 1), "cells": len(sources), "seeds": sorted(seeds),
            **json.loads(measured)}


def save(made: dict, folder: Path = FOLDER) -> Path:
    """Write a record in place of the chapter's last one.

    Args:
        made: From `record`.
        folder: That receives it.

    Returns:
        The file's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{made['chapter']}.json"
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf8")
    return path
