"""From stored bytes to an RGB picture, as ImageNet pipelines decode it, or a named error."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence

from PIL import Image, UnidentifiedImageError

from swinq.errors import DataError

# What counts as an image when a folder or an archive is listed; the content decides when it is read
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
)
# Pillow knows more formats than training sets hold; each one less is a parser less to attack
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_ENCODED_BYTES = 256 * 2**20  # larger files are no training images but decompression bombs
_SHOWN = 5  # names in a message before "and N more"


class UnreadableImagesError(DataError):
    """Images of a data set that cannot be read or decoded."""


class UnreadableImageError(DataError):
    """One image that cannot be read or decoded.

    Attributes:
        name: the image's name in its data set.
        reason: why, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the image {shown(name)}: {reason}", _REPAIR)
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str, str]]:
        return type(self), (self.name, self.reason)


_REPAIR = "repair or delete it; images are never skipped or replaced silently"


def is_image_name(name: str) -> bool:
    """Whether a file of this name is listed as an image; macOS's `._x.jpg` droppings are not."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in IMAGE_SUFFIXES


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes an encoded image to RGB.

    `convert("RGB")` and nothing else, as the checkpoints were trained: CMYK, grey, palettes and 16
    bits go through Pillow's own rules, transparency is dropped, EXIF orientation is not applied.
    Pillow's limit on pixels (Image.MAX_IMAGE_PIXELS) is an error here, not only a warning.

    Args:
        data: the file's bytes; its format is told by content, never by its name.
        name: what to call the image in an error.

    Raises:
        UnreadableImageError: truncated, damaged, too large or no image at all.
    """
    if not data:
        raise UnreadableImageError(name, "the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
                return picture.convert("RGB")
    # Pillow's decoders meet damage with a dozen exception types (OSError, SyntaxError, ValueError,
    # struct.error, EOFError, zlib.error, DecompressionBombError, ...); all of them mean the same.
    except Exception as error:
        raise UnreadableImageError(name, _reason(error)) from error


def unreadable(failures: Sequence[tuple[str, str]], checked: int) -> UnreadableImagesError:
    """One error for several images.

    Args:
        failures: (name, reason) of each unreadable image, at least one.
        checked: how many images had been tried when the work stopped.
    """
    failures = list(dict(failures).items())  # training may have met one in several epochs
    lines = [f"{len(failures)} of the {checked} images read so far cannot be read:"]
    lines += [f"  {shown(name)}: {reason}" for name, reason in failures[:_SHOWN]]
    if len(failures) > _SHOWN:
        lines.append(f"  and {len(failures) - _SHOWN} more")
    fix = "repair or delete these files; images are never skipped or replaced silently"
    return UnreadableImagesError("\n".join(lines), fix)


def shown(name: str) -> str:
    """A name fit for a terminal: file names may hold control characters."""
    return name if name.isprintable() else ascii(name)


def listed(names: Sequence[str]) -> str:
    """Up to five names and how many more, for a message."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(shown(name) for name in names[:_SHOWN]) + more


def _reason(error: Exception) -> str:
    """Pillow's complaint in one short line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else text[:117] + "..."
