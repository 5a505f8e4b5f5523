"""What can be told of every record before one is read: place, focal length, upright size and scene, 40 bytes each.

An index is a structured array of `ROW`, one row a record. It is built in one pass and kept in one file beside the data,
with a stamp of what it was built from; a local file is mapped, not read. A number that the record does not say, or says
wrongly, is NaN or 0: building never fails for a bad record, reading it does. What else is wrong with a record, such as
its labels, the index does not show.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import struct
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from etils import epath
from PIL import Image

ROW = np.dtype(
    [
        ("offset", "<i8"),  # of the line in the .jsonl, in bytes
        ("fx", "<f8"),  # px, of the upright image
        ("fy", "<f8"),
        ("line", "<u4"),  # number of the line, from 1
        ("width", "<u4"),  # px, of the upright image
        ("height", "<u4"),
        ("scene", "<u4"),  # crc32 of the scene's name; 0: no scene or no pose
    ]
)
MAX_SIDE = 2**31
BLOCK_BYTES = 2**18  # of a .jsonl, looked at together
HEADER_THREADS = 16
HEADER = struct.Struct("<16s32sQ8x")  # magic, SHA-256 of the stamp, number of rows
MAGIC = b"depth index 1\n".ljust(16, b"\0")
STAMP_BYTES = 2**20  # of the data file that are part of the stamp: catches a rewrite within one tick of the file clock
ORIENTATION_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
Progress = Callable[[int, int], None]  # (records done, records in all)


class Entry(NamedTuple):
    """What a row is made of."""

    offset: int
    line: int
    intrinsics: object  # as stored
    scene: str  # "": none
    image: object  # whatever the caller's `open_image` takes


class Batch(NamedTuple):
    """Rows of consecutive records, some of them still to be made."""

    rows: np.ndarray  # (records,) of ROW
    todo: dict[int, Entry]  # place in `rows` → what to make it of


def focal_from_fov(width: int, fov_degrees: float) -> float:
    """Returns the focal length in px of an image `width` px wide that shows `fov_degrees` from left to right."""
    return width / (2 * math.tan(math.radians(fov_degrees) / 2))


def is_unknown(intrinsics: object) -> bool:
    """Returns whether a record leaves its camera open: no intrinsics, or both focal lengths 0."""
    numbers = intrinsics.tolist() if isinstance(intrinsics, np.ndarray) else intrinsics
    return numbers is None or (isinstance(numbers, list) and len(numbers) in (4, 6) and numbers[:2] == [0, 0])


def upright_size(file: BinaryIO) -> tuple[int, int]:
    """Returns width and height of an encoded image as it is seen upright; reads the header only.

    An orientation that a PNG gives after its pixels, which no camera does, is not seen.
    """
    with Image.open(file) as image:
        if image.format == "PNG" and not ORIENTATION_KEYS & image.info.keys():
            return image.size  # Pillow would decode the whole image to look for one
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return (image.height, image.width) if turned else image.size


def collect(
    batches: Iterable[Batch],
    open_image: Callable[[object], BinaryIO],
    fov_degrees: float,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, bool]:
    """Returns the index of the records, in their order, and whether every image that had to be opened could be.

    Args:
      batches: of all records.
      open_image: opens `Entry.image`, for those that declare no size; called from threads, may raise anything.
      fov_degrees: horizontal field of view where the focal length is unknown; 0: it stays NaN.
      progress: called with the number of rows made.
    """
    index, complete = bytearray(), True
    with concurrent.futures.ThreadPoolExecutor(HEADER_THREADS) as pool:
        for rows, todo in batches:
            sizes = {place: _declared_size(entry.intrinsics) for place, entry in todo.items()}
            unsized = [place for place, size in sizes.items() if size == (0, 0)]
            read = pool.map(functools.partial(_size_or_0, open_image), [todo[place].image for place in unsized])
            found = dict(zip(unsized, read, strict=True))
            complete &= None not in found.values()
            sizes |= {place: size or (0, 0) for place, size in found.items()}
            for place, entry in todo.items():
                rows[place] = _row(entry, sizes[place], fov_degrees)
            index += rows.data
            progress(len(index) // ROW.itemsize)
    return np.frombuffer(index, ROW), complete


def row_of(entry: Entry, open_image: Callable[[object], BinaryIO], fov_degrees: float) -> np.ndarray:
    """Returns the row of one record, as `collect` makes it: a scalar of ROW."""
    size = _declared_size(entry.intrinsics)
    if size == (0, 0):
        size = _size_or_0(open_image, entry.image) or (0, 0)
    return np.array(_row(entry, size, fov_degrees), ROW)


def cached(file: epath.Path, stamp: dict, build: Callable[[], tuple[np.ndarray, bool]]) -> np.ndarray:
    """Returns the index in a cache file, mapped; builds and stores it where there is none whose stamp fits.

    What lies in a folder that is remote, or cannot be written, has a copy among this user's temporary files, which all
    processes of the host share. An index for which an image was out of reach is not stored: it may be there next time.
    """
    copy = _temporary_copy(file, stamp)
    places = (file, copy) if is_local(file) else (copy, file)
    rows = next((found for place in places if (found := _load(place, stamp)) is not None), None)
    if rows is None:
        rows, complete = build()
        if not (complete and len(rows)):
            return rows
        if store(file, stamp, rows) and is_local(file):
            return _load(file, stamp)
    if not isinstance(rows, np.memmap) and store(copy, stamp, rows):
        rows = _load(copy, stamp)
    return rows


def file_name(stem: str, options: dict) -> str:
    """Returns the name of a cache file; options that are not empty give it a name of its own."""
    told = {name: value for name, value in options.items() if value}
    return f"{stem}.{_digest(told).hex()[:8]}.index" if told else f"{stem}.index"


def _temporary_copy(file: epath.Path, stamp: dict) -> epath.Path:
    folder = epath.Path(tempfile.gettempdir()) / f"depthlm_jax_{os.getuid()}"
    with contextlib.suppress(OSError):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    place = os.path.abspath(file) if is_local(file) else os.fspath(file)
    return folder / f"{_digest(stamp | {'place': place}).hex()[:32]}.index"


def stamp_of(file: epath.Path) -> dict:
    """Returns what changes when the content of a file does, JSON-serialisable."""
    if is_local(file):
        status = os.stat(file)
        size, modified = status.st_size, status.st_mtime_ns
    else:
        status = file.stat()
        size, modified = status.length, status.mtime
    with file.open("rb") as content:
        return {"size": size, "modified": modified, "start": zlib.crc32(content.read(STAMP_BYTES))}


def is_local(file: epath.Path) -> bool:
    return "://" not in os.fspath(file)


def jsonl_batches(file: BinaryIO) -> Iterator[Batch]:
    """Yields the rows of the lines that are not blank, from the start of a JSONL file on."""
    offset, line = 0, 1
    while block := file.read(BLOCK_BYTES) + file.readline():
        yield _read_block(block, offset, line)
        offset, line = offset + len(block), line + block.count(b"\n")


def with_estimate(progress: Progress | None, file: BinaryIO, size: int) -> Callable[[int], None]:
    """Returns a progress callback for the lines read from a file of `size` bytes: their total is extrapolated."""

    def report(done: int) -> None:
        if progress is not None:
            progress(done, max(done, round(done * size / max(file.tell(), 1))))

    return report


# A value is taken from the bytes, without parsing the line, where only one reading is possible: no backslash
# in the line (so each quote begins or ends a text), no second brace (so each key is the record's own), the key once.
NUMBER = rb"\s*-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?\s*"
FAST = {
    name: re.compile(rb'"%s"(?:\s*:\s*%s)?' % (name.encode(), value))
    for name, value in {
        "intrinsics": rb"\[(%s(?:,%s){5})\]\s*[,}]" % (NUMBER, NUMBER),
        "scene": rb'"([^"]*)"\s*[,}]',
        "pose": rb"(\[)",
    }.items()
}


def _read_block(block: bytes, offset: int, first_line: int) -> Batch:
    """Returns the rows of the lines of a block; what cannot be told for certain from its bytes is parsed."""
    bytes_B = np.frombuffer(block, np.uint8)
    end_L = np.flatnonzero(bytes_B == ord("\n"))
    if not block.endswith(b"\n"):
        end_L = np.append(end_L, len(block))
    start_L = np.concatenate([[0], end_L[:-1] + 1])
    rows = np.zeros(len(end_L), ROW)
    rows["offset"], rows["line"] = offset + start_L, first_line + np.arange(len(end_L))
    certain_L = _fill_certain(rows, block, bytes_B, start_L, end_L)
    kept_L, todo = np.ones(len(end_L), bool), {}
    for place in np.flatnonzero(~certain_L).tolist():
        line = block[start_L[place] : end_L[place]]
        kept_L[place] = bool(line.strip())
        if kept_L[place]:
            todo[int(kept_L[:place].sum())] = _entry(line, offset + int(start_L[place]), first_line + place)
    return Batch(rows[kept_L], todo)


def _fill_certain(
    rows: np.ndarray, block: bytes, bytes_B: np.ndarray, start_L: np.ndarray, end_L: np.ndarray
) -> np.ndarray:
    """Returns which lines (L,) say for certain all that a row needs; fills their rows."""
    length = len(end_L)

    def count_L(character: str) -> np.ndarray:
        return np.bincount(np.searchsorted(end_L, np.flatnonzero(bytes_B == ord(character))), minlength=length)

    last_L = np.maximum(end_L - 1, start_L)
    last_L -= (bytes_B[np.minimum(last_L, len(block) - 1)] == ord("\r")) & (last_L > start_L)
    certain_L = (count_L("{") == 1) & (count_L("\\") == 0)
    certain_L &= (bytes_B[start_L] == ord("{")) & (bytes_B[last_L] == ord("}"))
    found = {}
    for name, pattern in FAST.items():
        matches = [(match.start(), match[1]) for match in pattern.finditer(block)]
        line_M = np.searchsorted(end_L, [start for start, _ in matches]).astype(int)
        certain_L &= np.bincount(line_M, minlength=length) <= 1
        certain_L[line_M[[value is None for _, value in matches]]] = False
        found[name] = {line: value for line, (_, value) in zip(line_M.tolist(), matches, strict=True)}
    has_camera = np.zeros(length, bool)
    has_camera[list(found["intrinsics"])] = True
    certain_L &= has_camera
    lines = np.flatnonzero(certain_L)
    text = b",".join(found["intrinsics"][line] for line in lines.tolist())
    camera_L6 = np.fromstring(text, sep=",").reshape(-1, 6)
    fits = (camera_L6[:, [0, 1, 4, 5]] > 0).all(axis=1) & np.isfinite(camera_L6).all(axis=1)
    fits &= (camera_L6[:, 4:] < MAX_SIDE).all(axis=1) & (camera_L6[:, 4:] == np.floor(camera_L6[:, 4:])).all(axis=1)
    certain_L[lines[~fits]] = False
    for column, name in ((0, "fx"), (1, "fy"), (4, "width"), (5, "height")):
        rows[name][lines[fits]] = camera_L6[fits, column]
    for line in found["scene"].keys() & found["pose"].keys():
        if certain_L[line]:
            rows["scene"][line] = _scene_number(found["scene"][line])
    return certain_L


def _entry(line: bytes, offset: int, number: int) -> Entry:
    fields = _parsed_fields(line)
    scene = fields.get("scene")
    has_scene = isinstance(scene, str) and fields.get("pose") is not None
    return Entry(offset, number, fields.get("intrinsics"), scene if has_scene else "", fields.get("image"))


def _parsed_fields(line: bytes) -> dict:
    with contextlib.suppress(ValueError, RecursionError):
        fields = json.loads(line)
        if isinstance(fields, dict):
            return fields
    return {}


def _numbers(intrinsics: object) -> Sequence[float]:
    """Returns the four or six numbers; six NaN where they are not."""
    fits = isinstance(intrinsics, list) and len(intrinsics) in (4, 6)
    if fits and all(type(value) is float or (type(value) is int and abs(value) < 2**1000) for value in intrinsics):
        return intrinsics
    return [math.nan] * 6


def _declared_size(intrinsics: object) -> tuple[int, int]:
    size = _numbers(intrinsics)[4:]
    if len(size) == 2 and all(0 < side < MAX_SIDE and side == int(side) for side in size):
        return int(size[0]), int(size[1])
    return 0, 0


def _size_or_0(open_image: Callable[[object], BinaryIO], image: object) -> tuple[int, int] | None:
    """Returns the upright size; (0, 0) of what is no image, None of what cannot be reached."""
    try:
        file = open_image(image)
    except ValueError:
        return 0, 0
    except Exception:  # noqa: BLE001 remote file systems raise many kinds
        return None
    with contextlib.suppress(Exception), file:  # Pillow raises nearly every kind
        return upright_size(file)
    return 0, 0


def _row(entry: Entry, size: tuple[int, int], fov_degrees: float) -> tuple:
    fx, fy = _numbers(entry.intrinsics)[:2]
    if not (0 < fx < math.inf and 0 < fy < math.inf):
        assumed = fov_degrees and size[0] and is_unknown(entry.intrinsics)
        fx = fy = focal_from_fov(size[0], fov_degrees) if assumed else math.nan
    return entry.offset, fx, fy, entry.line, *size, _scene_number(entry.scene.encode(errors="surrogatepass"))


def _scene_number(name: bytes) -> int:
    return (zlib.crc32(name) or 1) if name else 0


def _digest(stamp: dict) -> bytes:
    return hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).digest()


def _load(file: epath.Path, stamp: dict) -> np.ndarray | None:
    """Returns the rows of a cache file; None: there is none that fits."""
    try:
        if is_local(file):
            with file.open("rb") as content:
                head, size = content.read(HEADER.size), os.fstat(content.fileno()).st_size
        else:
            content = file.read_bytes()
            head, size = content[: HEADER.size], len(content)
        magic, digest, count = HEADER.unpack(head)
        if (magic, digest, size) != (MAGIC, _digest(stamp), HEADER.size + count * ROW.itemsize) or not count:
            return None
        if is_local(file):
            return np.memmap(file, ROW, "r", HEADER.size, (count,))
        return np.frombuffer(content, ROW, offset=HEADER.size)
    except Exception:  # noqa: BLE001 no cache, or none that can be read: remote file systems raise many kinds
        return None


def store(file: epath.Path, stamp: dict, rows: np.ndarray) -> bool:
    """Writes rows of ROW as a cache file, whole or not at all; returns whether it could be written."""
    unfinished = file.parent / f"{file.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        with unfinished.open("wb") as out:
            out.write(HEADER.pack(MAGIC, _digest(stamp), len(rows)))
            out.write(rows.data)
        unfinished.replace(file)
    except Exception:  # noqa: BLE001 a cache that cannot be written costs time, not the run
        with contextlib.suppress(Exception):
            unfinished.unlink(missing_ok=True)
        return False
    return True
