"""Depth records from a JSONL file or a prepared TFDS data set: sized, random access, checked, pixels not decoded.

A JSONL line is `{"image": "a/b.png", "intrinsics": [fx, fy, cx, cy, W, H], "pixel_coords": [[x, y], …],
"depth": [m, …]}`; W, H, `depth_kind` ("z" or "ray") and `dataset` may be left out. A TFDS data set has features of the
same names. Whatever is wrong with a record is an InputError that starts with the record's id.
"""

import array
import dataclasses
import io
import json
import os
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from depthlm_jax.config import Source
from depthlm_jax.errors import InputError

DEPTH_KINDS = ("z", "ray")
MAX_IMAGE_PIXELS = 80_000_000  # below Pillow's own warning; the largest public depth photographs have 24 million


@dataclasses.dataclass(frozen=True, eq=False)
class DepthRecord:
    """One image with metric depth at some of its pixels; pixel units are those of the upright (EXIF-oriented) image."""

    record_id: str  # "train.jsonl:12" (line, from 1) or "synthetic_depth/train:12" (index, from 0)
    image: bytes  # the encoded image file, as stored
    intrinsics: np.ndarray  # (4,) float64: fx, fy, cx, cy in px; an integer coordinate is a pixel centre
    pixel_coords: np.ndarray  # (N, 2) float64: x right, y down, in px
    depth_m: np.ndarray  # (N,) float64
    depth_kind: str  # z (along the principal axis) or ray (Euclidean)
    dataset: str
    size: tuple[int, int] | None  # width, height in px as declared; None: the record does not say


class Records(Protocol):
    """What a reader offers: `len(records)` and `records[i]`, from any thread, and pickling."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> DepthRecord: ...


def open_source(source: Source) -> Records:
    """Returns the records of a .jsonl file, or of the folder of a prepared TFDS data set.

    Raises:
      InputError: no such file, folder or split; no record in it.
    """
    path = Path(source.path)
    if path.suffix == ".jsonl" and path.is_file():
        records = JsonlRecords(source)
    elif (path / "dataset_info.json").is_file():
        records = TfdsRecords(source)
    else:
        raise InputError(
            f"no data at source.path {source.path!r}", found="nothing there" if not path.exists() else "something else",
            expected="a .jsonl file, or the folder of a prepared TFDS data set (with dataset_info.json in it)",
            fix="correct the path of this source, config.data.train.path or config.eval.source.path",
        )  # fmt: skip
    if len(records) == 0:
        raise InputError(
            f"{source.path}: no records", found=f"0 records (split {source.split!r})", expected="at least 1",
            fix="fill the file, or widen the split",
        )  # fmt: skip
    return records


class JsonlRecords:
    """Records of a JSONL file; memory holds 16 bytes a line."""

    def __init__(self, source: Source):
        self._source = source
        self._path = Path(source.path)
        self._image_root = Path(source.image_root) if source.image_root else self._path.parent
        self._offsets, self._line_numbers = index_lines(self._path)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> DepthRecord:
        _check_index(index, len(self))
        record_id = f"{self._path.name}:{self._line_numbers[index]}"
        with self._path.open("rb") as file:  # opened for each read: nothing shared between threads or processes
            file.seek(self._offsets[index])
            fields = parse_line(record_id, file.readline())
        defaults = {"depth_kind": self._source.depth_kind, "dataset": self._path.stem}
        return _record(record_id, defaults | fields | {"image": self._read_image(record_id, fields)})

    def _read_image(self, record_id: str, fields: dict) -> bytes:
        relative = _get(record_id, fields, "image")
        fix = "correct the record's `image`, or the source's image_root"
        if not (isinstance(relative, str) and _stays_inside(relative)):
            _fail(record_id, "image path leaves the image folder", relative, f"a path inside {self._image_root}", fix)
        try:
            return (self._image_root / relative).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null character
            _fail(record_id, f"cannot read image {relative!r}", error, f"a file inside {self._image_root}", fix)


def index_lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the byte offset and the number (from 1) of each line that is not blank, both int64."""
    offsets, numbers, offset = array.array("q"), array.array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                offsets.append(offset)
                numbers.append(number)
            offset += len(line)
    return np.array(offsets, np.int64), np.array(numbers, np.int64)


def parse_line(record_id: str, line: bytes) -> dict:
    """Returns the JSON object of one line, or raises InputError."""
    fix = "write one complete JSON object a line, UTF-8; if the file changed during the run, start again"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        _fail(record_id, "line is not JSON", f"{error}: {line[:80]!r}", "one JSON object", fix)
    if not isinstance(fields, dict):
        _fail(record_id, "line is not a JSON object", type(fields).__name__, '{"image": …}', fix)
    return fields


class TfdsRecords:
    """Records of a prepared TFDS data set in ArrayRecord files, read without TensorFlow."""

    def __init__(self, source: Source):
        try:
            builder = tfds.builder_from_directory(source.path)
        except Exception as error:  # noqa: BLE001 TFDS raises many kinds for damaged metadata
            _fail(source.path, "damaged data set", error, "dataset_info.json and features.json", "prepare it again")
        try:
            self._rows = builder.as_data_source(split=source.split, decoders={"image": tfds.decode.SkipDecoding()})
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{source.path}: cannot read split {source.split!r}", found=error,
                expected=f"one of {sorted(builder.info.splits)}, or a slice such as 'train[:50]'",
                fix="correct the split of this source",
            ) from None  # fmt: skip
        except NotImplementedError:
            raise InputError(
                f"{source.path}: no random access", found=f"files of format {builder.info.file_format}",
                expected="array_record", fix='prepare the data set again with file_format="array_record"',
            ) from None  # fmt: skip
        self._id = f"{builder.name}/{source.split}"
        self._defaults = {"depth_kind": source.depth_kind, "dataset": builder.name}
        kind = dict(builder.info.features.items()).get("depth_kind")
        self._kind_names = dict(enumerate(kind.names)) if isinstance(kind, tfds.features.ClassLabel) else {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> DepthRecord:
        _check_index(index, len(self))
        record_id = f"{self._id}:{index}"
        try:
            row = self._rows[index]
        except Exception as error:  # noqa: BLE001 ArrayRecord raises many kinds for a lost or cut shard
            _fail(record_id, "cannot read record", error, "the complete files of the data set", "prepare it again")
        fields = {name: value.decode() if name in self._defaults and isinstance(value, bytes) else value
                  for name, value in row.items()}  # fmt: skip
        if self._kind_names:
            fields["depth_kind"] = self._kind_names.get(int(fields["depth_kind"]), fields["depth_kind"])
        return _record(record_id, self._defaults | fields)


def validate(record: DepthRecord) -> DepthRecord:
    """Returns the record if all that can be told without decoding the image is right; raises InputError if not."""
    fail_at = record.record_id
    if record.depth_kind not in DEPTH_KINDS:
        _fail(fail_at, "unknown depth_kind", repr(record.depth_kind), " or ".join(DEPTH_KINDS), "correct the record")
    if not (np.isfinite(record.intrinsics).all() and (record.intrinsics[:2] > 0).all()):
        _fail(fail_at, "bad intrinsics", record.intrinsics.tolist(), "finite fx, fy, cx, cy in px, fx > 0, fy > 0",
              "give the camera's calibration, or leave the record out")  # fmt: skip
    points, depths = record.pixel_coords, record.depth_m
    if len(points) != len(depths):
        _fail(fail_at, "pixel_coords and depth differ in length", f"{len(points)} points, {len(depths)} depths",
              "one depth a point", "correct the record")  # fmt: skip
    if len(points) == 0:
        _fail(fail_at, "no points", "empty pixel_coords", "at least 1 point", "leave the record out")
    bad = np.flatnonzero(~(np.isfinite(depths) & (depths > 0)))
    if len(bad):
        _fail(fail_at, "depth is not a positive finite number", f"{depths[bad[0]]} m at point {bad[0]}", "metres > 0",
              "leave points without measured depth out")  # fmt: skip
    if record.size is not None:
        _check_points_inside(record, record.size)
    return record


def decode_image(record: DepthRecord) -> np.ndarray:
    """Returns the upright image of a record, (H, W, 3) uint8 RGB.

    Raises:
      InputError: the bytes are no complete 8-bit image of at most MAX_IMAGE_PIXELS; its size is not the declared one;
        a point lies outside it.
    """
    fix = "replace the image file"
    try:
        with Image.open(io.BytesIO(record.image)) as image:
            stored_size, mode = image.size, image.mode
            if stored_size[0] * stored_size[1] <= MAX_IMAGE_PIXELS:
                rgb_HW3 = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Image.DecompressionBombError as error:
        _fail(record.record_id, "image is too large", error, f"at most {MAX_IMAGE_PIXELS} pixels", fix)
    except Exception as error:  # noqa: BLE001 Pillow's readers raise nearly every kind for damaged bytes
        _fail(record.record_id, "cannot decode image", f"{error}, {len(record.image)} bytes", "a complete image", fix)
    if stored_size[0] * stored_size[1] > MAX_IMAGE_PIXELS:
        _fail(record.record_id, "image is too large", stored_size, f"at most {MAX_IMAGE_PIXELS} pixels", fix)
    if mode.startswith(("I", "F")):  # Pillow would clip it to 255
        _fail(record.record_id, "image has over 8 bits a channel", f"Pillow mode {mode}", "8-bit colour or grey", fix)
    size = rgb_HW3.shape[1], rgb_HW3.shape[0]
    if record.size is not None and record.size != size:
        _fail(record.record_id, "image size is not the declared one", f"{size} decoded, {record.size} declared",
              "the same width and height", "correct W, H of the record's intrinsics, or the image")  # fmt: skip
    _check_points_inside(record, size)
    return rgb_HW3


def _record(record_id: str, fields: dict) -> DepthRecord:
    intrinsics = _numbers(record_id, fields, "intrinsics", (-1,))
    if len(intrinsics) not in (4, 6):
        _fail(record_id, "wrong number of intrinsics", f"{len(intrinsics)} numbers", "fx, fy, cx, cy, or also W, H",
              "correct the record")  # fmt: skip
    declared = intrinsics[4:]
    if not (np.isfinite(declared).all() and (declared > 0).all() and (declared == np.round(declared)).all()):
        _fail(record_id, "bad image size W, H", declared.tolist(), "whole numbers > 0 in px", "correct the record")
    return validate(
        DepthRecord(
            record_id=record_id,
            image=_get(record_id, fields, "image"),
            intrinsics=intrinsics[:4],
            pixel_coords=_numbers(record_id, fields, "pixel_coords", (-1, 2)),
            depth_m=_numbers(record_id, fields, "depth", (-1,)),
            depth_kind=fields["depth_kind"],
            dataset=str(fields["dataset"]),
            size=(int(declared[0]), int(declared[1])) if len(declared) else None,
        )
    )


def _numbers(record_id: str, fields: dict, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a field as float64; -1 in `shape` stands for any length."""
    value = _get(record_id, fields, name)
    try:
        numbers = np.asarray(value)
    except ValueError:  # rows of unequal length
        numbers = np.asarray(None)
    if numbers.size == 0:
        numbers = np.zeros([max(length, 0) for length in shape])
    fits = numbers.ndim == len(shape) and numbers.shape[1:] == shape[1:]
    if not fits or numbers.dtype.kind not in "iuf":
        expected = "numbers of shape " + " × ".join("N" if length < 0 else str(length) for length in shape)
        _fail(record_id, f"{name} is not an array of numbers", str(value)[:80], expected, "correct the record")
    return numbers.astype(np.float64)


def _get(record_id: str, fields: dict, name: str) -> object:
    if name not in fields:
        _fail(record_id, f"{name!r} is missing", f"fields {sorted(fields)}", "image, intrinsics, pixel_coords, depth",
              "add it to the record")  # fmt: skip
    return fields[name]


def _check_points_inside(record: DepthRecord, size: tuple[int, int]) -> None:
    """Raises InputError if a point is in no pixel; the first pixel's area starts at -0.5."""
    inside_N = ((record.pixel_coords >= -0.5) & (record.pixel_coords < np.array(size) - 0.5)).all(axis=1)
    if not inside_N.all():
        index = int(np.argmin(inside_N))
        _fail(record.record_id, "point outside the image", f"{record.pixel_coords[index].tolist()} at point {index}",
              f"x < {size[0]}, y < {size[1]}, not negative", "correct the record (x is first)")  # fmt: skip


def _stays_inside(relative: str) -> bool:
    return not os.path.isabs(relative) and Path(os.path.normpath(relative)).parts[:1] != ("..",)


def _check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")


def _fail(record_id: str, what: str, found: object, expected: str, fix: str) -> NoReturn:
    raise InputError(f"{record_id}: {what}", found=found, expected=expected, fix=fix)
