"""Hundreds of damaged or odd records: each is read right or refused by name; nothing else happens."""

import dataclasses
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthlm_jax.config import Source
from depthlm_jax.data import images, records
from depthlm_jax.errors import InputError

WIDTH, HEIGHT = 48, 36
READS, REFUSED, EITHER = "reads", "refused", "either"


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    image: bytes
    line: bytes  # with IMAGE where the file's name goes
    expected: str
    size: tuple[int, int] = (WIDTH, HEIGHT)


def pixels(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)


def encode(image: Image.Image, kind: str, orientation: int = 1) -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image.save(file, kind, exif=exif)
    return file.getvalue()


def line_of(width: int = WIDTH, height: int = HEIGHT, declared: bool = True, **changes: object) -> bytes:
    camera = [40.0, 41.0, (width - 1) / 2, (height - 1) / 2, *([width, height] if declared else [])]
    points = [[0, 0], [width - 1, height - 1], [width // 2, 0]]
    fields = {"image": "IMAGE", "intrinsics": camera, "pixel_coords": points, "depth": [1.0, 2.0, 3.5]} | changes
    return json.dumps(fields).encode()


RGB = Image.fromarray(pixels(WIDTH, HEIGHT))
GOOD = {kind: encode(RGB, kind) for kind in ("PNG", "JPEG")}


def damaged_images(rng: random.Random) -> Iterator[Case]:
    for kind, content in GOOD.items():
        for number in range(60):
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 1, 3, 20))):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            yield Case(f"{kind} flipped {number}", bytes(flipped), line_of(), EITHER)
            in_header = bytearray(content)
            in_header[rng.randrange(40)] ^= 1 << rng.randrange(8)
            yield Case(f"{kind} header {number}", bytes(in_header), line_of(declared=number % 2 == 0), EITHER)
        for number in range(25):
            cut = content[: rng.randrange(len(content) - 40)]
            yield Case(f"{kind} cut {number}", cut, line_of(declared=number % 2 == 0), REFUSED)
            noise = rng.randbytes(len(cut))
            yield Case(f"{kind} noise {number}", content[:20] + noise, line_of(), REFUSED)
    yield Case("zero bytes", b"", line_of(), REFUSED)
    yield Case("no image", b"<html>404 Not Found</html>", line_of(declared=False), REFUSED)


def odd_images() -> Iterator[Case]:
    for mode in ("L", "LA", "P", "RGBA", "1"):
        yield Case(f"PNG {mode}", encode(RGB.convert(mode), "PNG"), line_of(), READS)
    for mode in ("L", "CMYK"):
        yield Case(f"JPEG {mode}", encode(RGB.convert(mode), "JPEG"), line_of(), READS)
    deep = Image.fromarray(np.full((HEIGHT, WIDTH), 60_000, np.uint16))
    yield Case("PNG 16 bit", encode(deep, "PNG"), line_of(), REFUSED)
    yield Case("TIFF float", encode(Image.new("F", (WIDTH, HEIGHT)), "TIFF"), line_of(), REFUSED)
    for orientation in range(1, 9):
        size = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
        for kind in GOOD:
            turned = encode(RGB, kind, orientation)
            for declared in (True, False):
                name = f"{kind} orientation {orientation} {declared}"
                yield Case(name, turned, line_of(*size, declared=declared), READS, size)
            if orientation >= 5:
                yield Case(f"{kind} orientation {orientation} ignored", turned, line_of(), REFUSED)
    for width, height in ((1, 1), (12_000, 2), (12_000, 300), (2, 12_000)):
        image = Image.fromarray(pixels(width, height))
        points = {"pixel_coords": [[0, 0]] * 3}
        for kind in GOOD:
            yield Case(f"{kind} {width} × {height}", encode(image, kind), line_of(width, height, **points), READS,
                       (width, height))  # fmt: skip
    bomb = GOOD["PNG"][:16] + (40_000).to_bytes(4, "big") * 2 + GOOD["PNG"][24:]
    yield Case("PNG 40 000 × 40 000", bomb, line_of(), REFUSED)


def damaged_lines(rng: random.Random) -> Iterator[Case]:
    good = line_of()
    for number in range(40):
        yield Case(f"line cut {number}", GOOD["PNG"], good[: rng.randrange(1, len(good))], REFUSED)
        flipped = bytearray(good)
        flipped[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        yield Case(f"line flipped {number}", GOOD["PNG"], bytes(flipped).replace(b"\n", b" "), EITHER)
    nan, infinite = float("nan"), float("inf")
    for value in (nan, infinite, -infinite, 0, -1, None, "1", True, [1], 10**400, {}):
        for place in range(3):
            depth: list = [1.0, 2.0, 3.0]
            depth[place] = value
            expected = EITHER if value is True else REFUSED  # NumPy takes it for a 1
            yield Case(f"depth {value!r:.9} {place}", GOOD["PNG"], line_of(depth=depth), expected)
    for name in ("image", "intrinsics", "pixel_coords", "depth"):
        for value in (None, [], {}, "", 7, [[]], [[1, 2], [3]], "../a.png", "/etc/passwd", "a\0b", "\ud800"):
            yield Case(f"{name} {value!r}", GOOD["PNG"], line_of(**{name: value}), REFUSED)
    swapped = [[0, WIDTH - 1], [HEIGHT - 1, 0], [0, 0]]
    for declared in (True, False):
        yield Case(f"swapped {declared}", GOOD["PNG"], line_of(declared=declared, pixel_coords=swapped), REFUSED)
    others = {"depth_kind": (3, None, "both"), "scene": (5, [], False), "pose": ("here", [[1], []], [], 0)}
    for name, value in ((name, value) for name, values in others.items() for value in values):
        yield Case(f"{name} {value!r}", GOOD["PNG"], line_of(**{name: value}), REFUSED)


def all_cases() -> list[Case]:
    rng = random.Random(20)
    return [*damaged_images(rng), *odd_images(), *damaged_lines(rng)]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return all_cases()


@pytest.fixture(scope="module")
def opened(cases, tmp_path_factory) -> records.Records:
    folder: Path = tmp_path_factory.mktemp("bad")
    lines = []
    for number, case in enumerate(cases):
        (folder / f"{number}.img").write_bytes(case.image)
        lines.append(case.line.replace(b"IMAGE", f"{number}.img".encode()) + b"\n")
    (folder / "bad.jsonl").write_bytes(b"".join(lines))
    return records.open_source(Source(str(folder / "bad.jsonl")))


def outcome(read: Callable[[], np.ndarray]) -> np.ndarray | str:
    try:
        return read()
    except InputError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning")
def test_each_case_is_read_right_or_refused_by_name(cases, opened):
    assert len(opened) == len(cases) >= 400
    counts = {READS: 0, REFUSED: 0}
    for number, case in enumerate(cases):
        result = outcome(lambda n=number: images.decode_image(opened[n]))
        if isinstance(result, str):
            assert case.expected != READS, f"{case.name}: {result}"
            assert result.startswith(f"bad.jsonl:{number + 1}: "), case.name
            assert "found:" in result and "fix:" in result, case.name
            counts[REFUSED] += 1
        else:
            assert case.expected != REFUSED, case.name
            assert result.dtype == np.uint8 and result.shape == (*case.size[::-1], 3), case.name
            counts[READS] += 1
    assert min(counts.values()) >= 50


def test_the_index_of_an_odd_image_agrees_with_its_pixels(cases, opened):
    rows = opened.index
    for number, case in enumerate(cases):
        if case.expected == READS:
            assert (rows["width"][number], rows["height"][number]) == case.size, case.name


def test_pixels_of_odd_images_are_not_replaced(cases, opened):
    by_name = {case.name: number for number, case in enumerate(cases)}
    grey_HW = np.asarray(RGB.convert("L"))
    names = "PNG L", "PNG RGBA", "PNG orientation 6 True"
    read = {name: images.decode_image(opened[by_name[name]]) for name in names}
    np.testing.assert_array_equal(read["PNG L"], np.repeat(grey_HW[..., None], 3, axis=2))
    np.testing.assert_array_equal(read["PNG RGBA"], pixels(WIDTH, HEIGHT))
    np.testing.assert_array_equal(read["PNG orientation 6 True"], np.rot90(pixels(WIDTH, HEIGHT), -1))
