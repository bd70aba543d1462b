"""Own images: a folder for each class, with or without folders for the splits above them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from ..samples import DataError, in_words
from .normalize import SPLITS, Raw, natural
from .pixels import flattened, opened, stacked

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
            ".pbm")


def read_folder(root: Path, size: int | tuple[int, int] | None = None,
                own: Mapping[str, str] | None = None) -> Raw:
    """Read a folder as `torchvision` does: the names of its folders are the classes.

    Args:
        root: Holds CLASS/IMAGE, or SPLIT/CLASS/IMAGE; deeper folders count to their class.
        size: Height and width, or one number for both; that of most images if None.
        own: What else a folder's name means, as a split.

    Returns:
        The samples in the order of their paths. Numbers in names are sorted as numbers.

    Raises:
        DataError: For a folder without classes, a class without images, or a file that is no
            image.
    """
    parts = _splits(root, own or {})
    names = sorted({folder.name for folders in parts.values() for folder in folders},
                   key=natural)
    if not names:
        raise DataError(f"{root} holds no folders of images", "make a folder for each class, and "
                        "name it after the class")
    images, labels, splits, left = [], [], [], []
    above = dict.fromkeys([root, *(root / split for split in parts)])
    loose = [path for folder in above for path in sorted(folder.iterdir())
             if path.is_file() and path.suffix.lower() in SUFFIXES]
    for split, folders in parts.items():
        for folder in folders:
            files, others = _files(folder)
            left += others
            images += [_image(file, root) for file in files]
            labels += [folder.name] * len(files)
            splits += [split] * len(files)
    if empty := [name for name in names if name not in labels]:
        raise DataError(f"{root}: there is no image of the class {in_words(empty)}",
                        f"bring some ({', '.join(SUFFIXES)}), or delete the folder")
    pixels, notes = stacked(images, None, size)
    if left:
        notes += (f"{len(left)} files are no images by their names, and were left alone, such "
                  f"as {left[0].relative_to(root)}",)
    if loose:
        notes += (f"{len(loose)} images lie in no folder of a class, and were left alone, such as "
                  f"{loose[0].relative_to(root)}",)
    given = any(split for split in parts)
    return Raw(pixels, labels, splits if given else None, tuple(names), notes=notes)


def holds_images(root: Path) -> bool:
    """Tell whether there is an image in some folder below this one."""
    return any(path.suffix.lower() in SUFFIXES for path in root.glob("*/**/*"))


def _splits(root: Path, own: Mapping[str, str]) -> dict[str, list[Path]]:
    """Return the folders of the classes by split; the split is empty if there are none."""
    folders = _folders(root)
    words = {word for words in SPLITS.values() for word in words}
    words |= {str(name).lower() for name in own}
    known = [folder for folder in folders if folder.name.lower() in words]
    if not known or not any(_folders(folder) for folder in known):
        return {"": folders}
    if unknown := [folder.name for folder in folders if folder not in known]:
        raise DataError(f"{root} holds splits, such as {known[0].name}, beside folders called "
                        f"{in_words(unknown)}", "put each class below its split, or say what "
                        f"each name means with splits={{{unknown[0]!r}: 'test'}} (or 'drop')",
                        "splits")
    return {folder.name: _folders(folder) for folder in known}


def _folders(root: Path) -> list[Path]:
    found = [path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._"]
    return sorted(found, key=lambda path: natural(path.name))


def _files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the images, and what else lies beside them and is not hidden."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    files.sort(key=lambda path: [natural(part) for part in path.parts])
    return ([path for path in files if path.suffix.lower() in SUFFIXES],
            [path for path in files if path.suffix.lower() not in SUFFIXES])


def _image(path: Path, root: Path) -> Image.Image:
    where = str(path.relative_to(root))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror})",
                        "check that you may read it") from error
    return flattened(opened(data, where), where)
