"""Images of any kind as arrays of 8 bits: depth, palette, transparency and size."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..roles import Pictures
from ..samples import DataError

GRAY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
DEEP = ("I", "I;16", "I;16L", "I;16B", "I;16N")


def opened(data: bytes, where: str) -> Image.Image:
    """Return the image in a file, read to its end.

    Args:
        data: Content of the file.
        where: Names it, for the message.

    Raises:
        DataError: If it is no image, or is cut short.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        said = "it is of no form that is known" if "BytesIO" in str(error) else error
        raise DataError(f"{where} is no image that can be read ({said})",
                        "get it again, or leave it out") from error
    return image


def flattened(image: Image.Image, where: str) -> Image.Image:
    """Return an image of 8 bits without palette and transparency.

    Args:
        image: Of any kind; 16 bits are scaled to 8, and what is transparent becomes white.
        where: Names it, for the message.

    Returns:
        An image of mode `L` if it was gray, else `RGB`.

    Raises:
        DataError: For 32 bits a pixel and channel, whose range nobody knows.
    """
    gray = image.mode in GRAY
    if image.mode in DEEP:
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"{where} has values outside 0 to 65535", "save it with 8 or 16 bits")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "F":
        raise DataError(f"{where} has 32 bits a pixel", "save it with 8 or 16 bits")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, clear).convert("RGB")
    return image.convert("L" if gray else "RGB")


def stacked(images: Sequence[Image.Image], mode: str | None = None,
            size: int | tuple[int, int] | None = None) -> tuple[Pictures, tuple[str, ...]]:
    """Bring images to one size and one number of channels.

    Args:
        images: From `flattened`.
        mode: `L` or `RGB`; if None, `RGB` if one of them has colors.
        size: Height and width, or one number for both; that of most images if None.

    Returns:
        The images, and what was done to some of them, in sentences.
    """
    mode = mode or ("L" if all(image.mode == "L" for image in images) else "RGB")
    wanted = _size(images, size)
    other = sum(image.size != wanted for image in images)
    arrays = [np.asarray(_resized(image.convert(mode), wanted)) for image in images]
    array = torch.from_numpy(np.stack(arrays))
    pixels = (array[..., None] if array.dim() == 3 else array).permute(0, 3, 1, 2).contiguous()
    notes = (f"{other} images were brought to {wanted[1]} x {wanted[0]} pixels (height x width)",
             ) if other else ()
    return Pictures(pixels), notes


def _size(images: Sequence[Image.Image], size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Return width and height."""
    if size is None:
        return Counter(image.size for image in images).most_common(1)[0][0]
    height, width = (size, size) if isinstance(size, int) else size
    return width, height


def check_size(size: object) -> None:
    """Refuse a size that is none.

    Args:
        size: Height and width, one number for both, or None.

    Raises:
        DataError: For anything else.
    """
    both = (size, size) if isinstance(size, int) else size
    fits = size is None or (isinstance(both, tuple | list) and len(both) == 2
                            and all(type(side) is int and side > 0 for side in both))
    if not fits:
        raise DataError(f"size={size!r} is no size", "use one number of pixels, or (height, "
                        "width)")


def _resized(image: Image.Image, wanted: tuple[int, int]) -> Image.Image:
    return image if image.size == wanted else image.resize(wanted, Image.Resampling.BILINEAR)


def as_images(samples: object, size: int | tuple[int, int] | None = None
              ) -> tuple[Pictures, tuple[str, ...]] | None:
    """Return samples as images, and what was done to them; None if they are something else.

    Args:
        samples: An array or tensor of uint8, images of Pillow, or texts.
        size: As for `stacked`; arrays keep theirs.

    Raises:
        DataError: For an array of another type or shape.
    """
    if isinstance(samples, Pictures):
        return samples, ()
    if isinstance(samples, np.ndarray | torch.Tensor) and samples.ndim > 1:
        return _of_array(torch.as_tensor(samples)), ()
    if len(samples) and all(isinstance(sample, Image.Image) for sample in samples):
        return stacked([flattened(image, f"image {i}") for i, image in enumerate(samples)], None,
                       size)
    return None


def _of_array(array: torch.Tensor) -> Pictures:
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
    return Pictures(array.contiguous().clone())
