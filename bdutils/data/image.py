"""Images from outside: of any depth, palette, transparency and size, alone or in folders."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..roles import Images
from ..samples import DataError, in_words
from .labels import SPLITS, Raw, natural

GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm",
            ".pbm")
Size = int | tuple[int, int] | None  # height and width, or one number for both


def opened(data: bytes, where: str) -> Image.Image:
    """Return the image in a file, read to its end, with 8 bits and without transparency.

    Args:
        data: Content of the file. 16 bits are scaled to 8, and what is transparent becomes white.
        where: Names it, for the message.

    Returns:
        An image of mode `L` if it was gray, else `RGB`.

    Raises:
        DataError: If it is no image, is cut short, or has a range that nobody knows.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        said = "it is of no form that is known" if "BytesIO" in str(error) else error
        raise DataError(f"{where} is no image that can be read ({said})",
                        "get it again, or leave it out") from error
    return flattened(image, where)


def flattened(image: Image.Image, where: str) -> Image.Image:
    """Return an image of 8 bits without palette and transparency, `L` or `RGB`."""
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{where} has values outside 0 to 65535", "save it with 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise DataError(f"{where} has 32 bits a pixel", "save it with 8 or 16 bits")
    gray = image.mode in GRAY
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if gray else "RGB")


def stacked(images: Sequence[Image.Image], size: Size = None, mode: str | None = None
            ) -> tuple[Images, tuple[str, ...]]:
    """Bring images to one size and one number of channels.

    Args:
        images: From `opened` or `flattened`.
        size: That of most images if None.
        mode: `L` or `RGB`; if None, `RGB` if one of them has colors.

    Returns:
        The images, and what was done to some of them, in sentences.
    """
    mode = mode or ("L" if all(image.mode == "L" for image in images) else "RGB")
    if size is None:
        width, height = Counter(image.size for image in images).most_common(1)[0][0]
    else:
        height, width = (size, size) if isinstance(size, int) else size
    other = sum(image.size != (width, height) for image in images)
    arrays = [np.asarray(image.convert(mode) if image.size == (width, height) else
                         image.convert(mode).resize((width, height), Image.Resampling.BILINEAR))
              for image in images]
    pixels = torch.from_numpy(np.stack(arrays)).reshape(len(images), height, width, -1)
    notes = (f"{other} images were brought to {height} x {width} pixels (height x width)",)
    return Images(pixels.permute(0, 3, 1, 2).contiguous()), notes if other else ()


def check_size(size: object) -> None:
    """Reject a size that is none."""
    both = (size, size) if isinstance(size, int) else size
    if size is not None and not (isinstance(both, tuple | list) and len(both) == 2 and all(
            type(side) is int and side > 0 for side in both)):
        raise DataError(f"size={size!r} is no size", "use one number of pixels, or (height, "
                        "width)")


def as_images(samples: Any, size: Size = None) -> tuple[Images, tuple[str, ...]] | None:
    """Return samples as images, and what was done to them; None if they are something else.

    Args:
        samples: An array or tensor of uint8, images of Pillow, or texts.
        size: As for `stacked`; arrays keep theirs.

    Raises:
        DataError: For an array of another type or shape.
    """
    if isinstance(samples, Images):
        return samples, ()
    if isinstance(samples, np.ndarray | torch.Tensor) and samples.ndim > 1:
        if isinstance(samples, np.ndarray) and samples.dtype.kind not in "biuf":
            raise DataError(f"samples are an array of {samples.dtype} of shape {samples.shape}",
                            "give texts as a list or as one column")
        return _of_array(torch.as_tensor(samples)), ()
    if len(samples) and all(isinstance(sample, Image.Image) for sample in samples):
        return stacked([flattened(x, f"image {i}") for i, x in enumerate(samples)], size)
    return None


def _of_array(array: torch.Tensor) -> Images:
    if array.dtype != torch.uint8 or array.dim() not in (3, 4):
        raise DataError(f"images must be uint8 of shape (n, H, W), (n, C, H, W) or (n, H, W, C), "
                        f"not {array.dtype} of shape {tuple(array.shape)}",
                        "scale to 0 to 255 and convert")
    if array.dim() == 3:
        array = array[:, None]
    elif array.shape[1] not in (1, 3):
        array = array.permute(0, 3, 1, 2)
    if array.shape[1] not in (1, 3):
        raise DataError(f"images have one or three channels, not those of shape "
                        f"{tuple(array.shape)}", "drop the others")
    return Images(array.contiguous().clone())


def holds_images(root: Path) -> bool:
    """Tell whether there is an image in some folder below this one."""
    return any(path.suffix.lower() in SUFFIXES for path in root.glob("*/**/*"))


def read_folder(root: Path, size: Size = None, own: Mapping[str, str] | None = None) -> Raw:
    """Read a folder as `torchvision` does: the names of its folders are the classes.

    Args:
        root: Holds CLASS/IMAGE, or SPLIT/CLASS/IMAGE; deeper folders count to their class.
        size: As for `stacked`.
        own: What else a folder's name means, as a split.

    Returns:
        The samples in the order of their paths. Numbers in names are sorted as numbers.

    Raises:
        DataError: For a folder without classes, a class without images, or a file that is no
            image.
    """
    parts = _parts(root, own or {})
    names = sorted({folder.name for folders in parts.values() for folder in folders},
                   key=natural)
    if not names:
        raise DataError(f"{root} holds no folders of images", "make a folder for each class, and "
                        "name it after the class")
    images, labels, splits, others = [], [], [], []
    for split, folder, path in _files(parts):
        if path.suffix.lower() not in SUFFIXES:
            others.append(path)
            continue
        images.append(_image(path, str(path.relative_to(root))))
        labels.append(folder.name)
        splits.append(split)
    if empty := [name for name in names if name not in labels]:
        raise DataError(f"{root}: there is no image of the class {in_words(empty)}",
                        f"bring some ({', '.join(SUFFIXES)}), or delete the folder")
    above = dict.fromkeys([root, *(root / split for split in parts)])
    loose = [path for folder in above for path in sorted(folder.iterdir())
             if path.is_file() and path.suffix.lower() in SUFFIXES]
    pixels, notes = stacked(images, size)
    notes += tuple(f"{len(paths)} {what}, and were left alone, such as "
                   f"{paths[0].relative_to(root)}" for paths, what in (
                       (others, "files are no images by their names"),
                       (loose, "images lie in no folder of a class")) if paths)
    return Raw(pixels, labels, splits if any(parts) else None, tuple(names), notes=notes)


def image_paths(root: Path) -> list[str]:
    """Return where the images of `read_folder` lie in their folder, in its order."""
    return [str(path.relative_to(root)) for _, _, path in _files(_parts(root, {}))
            if path.suffix.lower() in SUFFIXES]


def _files(parts: Mapping[str, Sequence[Path]]) -> Iterator[tuple[str, Path, Path]]:
    """Give the files of each split and class, in the order of their paths."""
    for split, folders in parts.items():
        for folder in folders:
            files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
            for path in sorted(files, key=lambda path: [natural(part) for part in path.parts]):
                yield split, folder, path


def _parts(root: Path, own: Mapping[str, str]) -> dict[str, list[Path]]:
    """Return the folders of the classes by split; the split is empty if there are none."""
    folders = _folders(root)
    words = {word for words in SPLITS.values() for word in words}
    words |= {str(name).lower() for name in own}
    known = [folder for folder in folders if folder.name.lower() in words]
    if not any(_folders(folder) for folder in known):
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


def _image(path: Path, where: str) -> Image.Image:
    try:
        return opened(path.read_bytes(), where)
    except OSError as error:
        raise DataError(f"{where} cannot be read ({error.strerror})",
                        "check that you may read it") from error
