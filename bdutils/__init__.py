"""bdutils: the library under the book "Backdoors in Neural Networks"."""

import os
import random
import sys
from pathlib import Path

__version__ = "0.1.0"

SCALES = ("small", "full")


def scale(value: str | None = None) -> str:
    """Return the scale in force, the environment variable BDUTILS_SCALE.

    Args:
        value: Another one to take instead.

    Returns:
        `small` (CPU, minutes), also if it is not set, or `full` (hub, GPU).

    Raises:
        ValueError: For any other value.
    """
    return _known(value or os.environ.get("BDUTILS_SCALE", "small"))


def use_scale(value: str) -> None:
    """Choose the scale for this process and its children.

    Args:
        value: `small` or `full`.

    Raises:
        ValueError: For any other value.
    """
    os.environ["BDUTILS_SCALE"] = _known(value)


def _known(value: str) -> str:
    if value not in SCALES:
        raise ValueError(f"unknown scale {value!r}: use one of {SCALES}")
    return value


def use_cache(folder: str | os.PathLike) -> None:
    """Keep models and data in this folder, such as one on a drive that outlives the machine.

    Args:
        folder: Made if it is missing; the one around it must be there.

    Raises:
        FileNotFoundError: If it is not: a drive that is not mounted would be taken for a folder of
            this machine.
        NotADirectoryError: If it is a file.
    """
    try:
        chosen = Path(folder).expanduser().absolute()
    except RuntimeError:
        raise FileNotFoundError(f"there is no home folder for {folder}: write the path in "
                                "full") from None
    if chosen.exists() and not chosen.is_dir():
        raise NotADirectoryError(f"{chosen} is a file: name a folder")
    if not chosen.parent.is_dir():
        raise FileNotFoundError(f"{chosen.parent} is not there: mount the drive first, or make "
                                "the folder")
    os.environ["BDUTILS_CACHE"] = str(chosen)


def _keep_out_of_home() -> None:
    """Let libraries, which ask once, keep files beside ours if home cannot be written."""
    chosen = os.environ.get("BDUTILS_CACHE")
    if not chosen or chosen.startswith("~"):
        return
    home = os.path.expanduser("~")
    if home == "~" or not os.access(home, os.W_OK):
        for variable, name in (("HF_HOME", "huggingface"), ("MPLCONFIGDIR", "matplotlib")):
            folder = Path(chosen).absolute() / name
            if "XDG_CACHE_HOME" not in os.environ and variable not in os.environ:
                os.environ[variable] = str(folder)


_keep_out_of_home()


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch with a non-negative integer."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def check() -> None:
    """Print what this machine offers: versions, device, scale and cache folder."""
    import datasets
    import torch
    import transformers

    from .assets import cache_dir

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name(0)
    elif "google.colab" in sys.modules:
        device = "no GPU: Runtime > Change runtime type > T4"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    print(f"bdutils {__version__}, scale {scale()}, {device}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"datasets {datasets.__version__}, Python {sys.version.split()[0]}")
    print(f"cache {cache_dir()}")
