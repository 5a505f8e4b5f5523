import dataclasses
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from depthlm_jax.config import Geometry
from depthlm_jax.data import camera as cam
from depthlm_jax.data import images
from depthlm_jax.data.depth_record import DepthRecord
from depthlm_jax.errors import InputError

STREET = cam.Camera(2000.0, 2000.0, 159.5, 120.0, 321, 243)  # half of it is the unified focal length


def smooth(width, height):
    """A picture without hard edges, so that JPEG changes it little."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 19) + np.cos(y / 23), np.sin((x + y) / 31), np.cos((x - 2 * y) / 41)]
    return Image.fromarray((127.5 + 60 * np.stack(waves, -1)).astype(np.uint8))


def noise(width=40, height=30):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def record(content, size=None, points=((0.0, 0.0),)):
    points = np.array(points)
    return DepthRecord("d.jsonl:7", content, np.array([30.0, 30, 20, 15]), points, np.ones(len(points)), "z", "d", size)


def message(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert str(caught.value).startswith("d.jsonl:7: ")
    return str(caught.value)


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_pixels_are_those_of_the_file(kind):
    opened = images.open_image(record(encode(noise(), kind, **({"lossless": True} if kind == "WEBP" else {}))))
    assert opened.size == (40, 30)
    for _ in range(2):
        pixels, reduction = opened.pixels(2)  # only JPEG can be decoded at half its size
        assert reduction == 1 and np.array_equal(pixels, np.asarray(noise()))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_other_modes_become_rgb(mode):
    kind, image = ("TIFF" if mode == "CMYK" else "PNG"), noise().convert(mode)
    pixels = images.decode_image(record(encode(image, kind)))
    assert pixels.shape == (30, 40, 3) and np.array_equal(pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpeg_of_any_mode_is_decoded_at_half_its_size(mode):
    image = smooth(320, 240).convert(mode)
    pixels, reduction = images.open_image(record(encode(image, "JPEG", quality=95))).pixels(2)
    assert reduction == 2 and pixels.shape == (120, 160, 3)
    halves = np.asarray(image.convert("RGB")).reshape(120, 2, 160, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels - halves).mean() < 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind, orientation):
    content = encode(smooth(48, 32), kind, exif=turned(orientation))
    opened = images.open_image(record(content, (32, 48) if orientation >= 5 else (48, 32)))
    stored = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    unturned = stored.transpose(1, 0, 2) if orientation >= 5 else stored
    flips = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
    down, right = flips[orientation]
    pixels, _ = opened.pixels(4)
    assert pixels.shape[1::-1] == opened.size or (orientation == 1 and kind == "JPEG")
    assert np.array_equal(images.decode_image(opened.record), unturned[::down, ::right])


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (9, 17), (64, 64), (321, 243)])
@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_reduced_size_is_rounded_up(size, reduction):
    pixels, done = images.open_image(record(encode(smooth(*size), "JPEG"))).pixels(reduction)
    assert done == (reduction if min(size) >= reduction else 1)
    assert pixels.shape == (-(-size[1] // done), -(-size[0] // done), 3)


# --- what a view shows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale, reduction", [(0.5, 2), (0.4, 2), (0.25, 4), (0.1, 4)])
@pytest.mark.parametrize("options", [{"quality": 98, "subsampling": 0}, {"quality": 90}])
def test_reduced_jpeg_shows_the_same_as_the_whole_one(scale, reduction, options):
    """Half a pixel of shift would be seen: the picture's slopes are up to 3 levels a px."""
    opened = images.open_image(record(encode(smooth(641, 483), "JPEG", **options)))
    for seed in range(3):
        geometry = Geometry(focal_px=2000 * scale, crop_width=(56, 56), crop_height=(28, 28))
        chance = cam.Chance(*np.random.default_rng(seed).random(6))
        view = cam.plan_view(dataclasses.replace(STREET, width=641, height=483), geometry, 28, chance)
        assert view.reduction == reduction and opened.pixels(reduction)[1] == reduction
        whole = Image.fromarray(images.decode_image(opened.record)).resize(
            view.resized, Image.Resampling.BICUBIC, box=view.box
        )
        difference = (images.render(opened, view).astype(int) - np.asarray(whole))[2:, 2:]
        assert np.abs(difference).max() <= 6 and np.abs(difference.mean()) < 0.5 and np.abs(difference).mean() < 1


def test_official_views_are_pillows_to_the_bit():
    content = encode(noise(64, 48), "JPEG")
    view = cam.plan_view(cam.Camera(40.0, 41.0, 3, 4, 64, 48), Geometry(mode="official", focal_px=15.0), 28, None)
    by_pillow = np.asarray(Image.open(io.BytesIO(content)).resize((24, 18)))
    assert np.array_equal(images.render(images.open_image(record(content)), view), by_pillow)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("reduction", [1, 2])
def test_truncated_file(kind, reduction):
    content = encode(noise(), kind)[:-200]

    def read():
        return images.open_image(record(content, (40, 30))).pixels(reduction)

    assert "cannot decode image" in message(read)


def test_bytes_that_are_no_image():
    assert "cannot decode image" in message(images.open_image, record(b"<html>404</html>"))
    assert "0 bytes" in message(images.open_image, record(b""))


def test_damaged_files_by_the_hundred_are_read_or_refused():
    """A decoder may not notice a wrong bit; then the size is still right. Nothing but InputError comes out."""
    rng = np.random.default_rng(0)
    contents = [encode(noise(), "PNG"), encode(noise(), "JPEG"), encode(smooth(40, 30), "JPEG", progressive=True)]
    refused = 0
    for number in range(600):
        content = bytearray(contents[number % 3])
        if number % 2:
            content = content[: rng.integers(len(content))]
        else:
            for place in rng.integers(0, len(content), 1 + number % 5):
                content[place] ^= 1 << rng.integers(8)
        try:
            pixels, reduction = images.open_image(record(bytes(content), (40, 30))).pixels(1 + number % 2)
            assert pixels.shape == (-(-30 // reduction), -(-40 // reduction), 3)
        except InputError as error:
            refused += str(error).startswith("d.jsonl:7: ")
    assert 350 < refused < 600


@pytest.mark.parametrize("array", [np.full((30, 40), 60_000, np.uint16), np.full((30, 40), 0.5, np.float32)])
def test_more_than_8_bits_are_refused(array):
    assert "over 8 bits a channel" in message(images.open_image, record(encode(Image.fromarray(array), "TIFF")))


def test_declared_size_must_be_the_one_of_the_file():
    text = message(images.open_image, record(encode(noise(41, 30)), (40, 30)))
    assert "size is not the declared one\n  found:    (41, 30) decoded, (40, 30) declared" in text
    assert "(40, 30) decoded" in message(images.open_image, record(encode(noise(), exif=turned(3)), (30, 40)))


def test_points_are_checked_against_the_file_if_no_size_is_declared():
    text = message(images.open_image, record(encode(noise(20, 30)), None, [(3.0, 3), (39, 29)]))
    assert "point outside the image\n  found:    [39.0, 29.0] at point 1\n  expected: x < 20" in text


@pytest.mark.parametrize("side", [9_000, 15_000, 2**31 - 1])
def test_image_that_would_fill_the_memory(side):
    header = b"IHDR" + struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    text = message(images.open_image, record(content + encode(noise())[33:]))
    assert "image is too large" in text and "80000000 pixels" in text
