"""Stands in for Google Drive: mounting makes a folder."""

from pathlib import Path


def mount(mountpoint: str) -> None:
    """Make the folder where Colab would show the reader's drive."""
    (Path(mountpoint) / "MyDrive").mkdir(parents=True, exist_ok=True)
