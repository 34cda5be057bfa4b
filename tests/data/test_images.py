"""Decoding: Pillow's convert("RGB") and nothing else, and a named error for every damaged file."""

import functools
import io
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from swinq.data.images import UnreadableImageError, decode, is_image_name, unreadable


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(256, size=shape).astype(np.uint8)


ODD_BUT_SOUND = {
    "cmyk jpeg": saved(Image.fromarray(noise(16, 16, 4), "CMYK"), "JPEG"),
    "grey jpeg": saved(Image.fromarray(noise(16, 16)), "JPEG"),
    "progressive jpeg": saved(Image.fromarray(noise(16, 16, 3)), "JPEG", progressive=True),
    "grey with alpha": saved(Image.fromarray(noise(16, 16, 2), "LA"), "PNG"),
    "rgba": saved(Image.fromarray(noise(16, 16, 4)), "PNG"),
    "palette with transparency": saved(
        Image.fromarray(noise(16, 16, 3)).convert("P"), "PNG", transparency=bytes(range(250))
    ),
    "palette with one transparent colour": saved(
        Image.fromarray(noise(16, 16, 3)).convert("P"), "PNG", transparency=3
    ),
    "16 bit": saved(Image.fromarray(noise(16, 16).astype(np.uint16) * 257), "PNG"),
    "1 bit": saved(Image.fromarray(noise(16, 16)).convert("1"), "PNG"),
    "gif": saved(Image.fromarray(noise(16, 16, 3)).convert("P"), "GIF"),
    "webp": saved(Image.fromarray(noise(16, 16, 3)), "WEBP", lossless=True),
    "bmp": saved(Image.fromarray(noise(16, 16, 3)), "BMP"),
    "tiff": saved(Image.fromarray(noise(16, 16, 3)), "TIFF"),
    "ppm": saved(Image.fromarray(noise(16, 16, 3)), "PPM"),
    "one pixel": saved(Image.fromarray(noise(1, 1, 3)), "PNG"),
}


@pytest.mark.parametrize("kind", ODD_BUT_SOUND)
@pytest.mark.filterwarnings("ignore:Palette images:UserWarning")  # Pillow's, of the oracle
def test_odd_images_decode_as_pillow_converts_them(kind: str) -> None:
    data = ODD_BUT_SOUND[kind]
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    got = decode(data, "x.JPEG")  # the wrong suffix for most: content decides
    assert got.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def test_transparency_of_palettes_does_not_warn() -> None:
    decode(ODD_BUT_SOUND["palette with transparency"], "x.png")  # warnings are errors here


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    image = Image.fromarray(noise(10, 20, 3))
    turned = decode(saved(image, "JPEG", exif=exif), "x.jpg")
    plain = decode(saved(image, "JPEG"), "x.jpg")
    assert turned.size == (20, 10)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(plain))


def test_broken_exif_is_no_reason_to_fail() -> None:
    data = saved(Image.fromarray(noise(16, 16, 3)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode(data, "x.jpg").size == (16, 16)


@functools.cache
def damaged() -> dict[str, bytes]:
    jpeg = saved(Image.fromarray(noise(64, 64, 3)), "JPEG")
    png = saved(Image.fromarray(noise(64, 64, 3)), "PNG")
    webp = saved(Image.fromarray(noise(64, 64, 3)), "WEBP")
    wide = saved(Image.new("1", (12_000, 12_000)), "PNG")  # 144 million pixels in 18 kB
    vast = bytearray(png)
    vast[16:24] = b"\0\1\0\0" * 2  # 65,536 x 65,536 pixels says the header
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty": b"",
        "one byte": b"\xff",
        "html": b"<html><body>404 Not Found</body></html>",
        "zeros": bytes(4096),
        "jpeg header only": jpeg[:20],
        "jpeg cut in the middle": jpeg[: len(jpeg) // 2],
        "jpeg without its tail": jpeg[:-200],
        "png cut in the middle": png[: len(png) // 2],
        "png without its tail": png[:-40],
        "png with a flipped byte": bytes(flipped),
        "png signature only": png[:8],
        "webp cut in the middle": webp[: len(webp) // 2],
        "gif header only": b"GIF89a" + bytes(4),
        "bmp header only": b"BM" + bytes(30),
        "tiff header only": b"II*\0" + bytes(4),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "pixel bomb": wide,
        "greater pixel bomb": bytes(vast),
        "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged_files_are_named_errors(kind: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        decode(damaged()[kind], "val/cat/7.jpg")
    message = str(caught.value)
    assert "val/cat/7.jpg" in message and "fix:" in message
    assert len(message.splitlines()) == 2 and "0x" not in message


def test_random_damage_ends_in_an_image_or_the_one_error() -> None:
    random = np.random.RandomState(1)
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        good = np.frombuffer(saved(Image.fromarray(noise(24, 24, 3)), form), np.uint8)
        for _ in range(60):
            bad = good.copy()
            places = random.randint(len(bad), size=random.randint(1, 8))
            bad[places] = random.randint(256, size=len(places))
            try:
                assert decode(bad.tobytes(), "x").mode == "RGB"
            except UnreadableImageError:
                pass


def test_many_failures_are_listed_in_few_lines() -> None:
    error = unreadable([(f"val/{i}.jpg", "the file is empty") for i in range(40)], checked=100)
    lines = str(error).splitlines()
    assert lines[0].startswith("40 of the 100") and lines[-2].strip() == "and 35 more"
    assert len(lines) <= 10 and "val/4.jpg" in str(error) and "val/5.jpg" not in str(error)


def test_control_characters_in_a_name_are_not_printed() -> None:
    assert "\x1b" not in str(UnreadableImageError("val/\x1b[2Jevil.jpg", "the file is empty"))


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImageError("a.jpg", "cut")))  # noqa: S301
    assert (error.name, error.reason) == ("a.jpg", "cut") and "a.jpg" in str(error)


@pytest.mark.parametrize(
    ("name", "is_image"),
    [
        ("a.jpg", True),
        ("a/b.JPEG", True),
        ("a.b.webp", True),
        ("._a.jpg", False),
        ("a/.hidden.png", False),
        ("jpg", False),
        ("a.txt", False),
        ("classes.json", False),
    ],
)
def test_images_are_told_by_their_suffix(name: str, is_image: bool) -> None:
    assert is_image_name(name) is is_image


def test_camera_jpegs_with_several_pictures_give_the_first(
    make_picture: Callable[..., Image.Image],
) -> None:
    first = make_picture(1)
    data = saved(first, "MPO", save_all=True, append_images=[make_picture(2)])
    np.testing.assert_array_equal(
        np.asarray(decode(data, "x.jpg")), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )
