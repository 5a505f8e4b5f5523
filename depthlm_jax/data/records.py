"""Depth records from a JSONL file or a prepared TFDS data set: sized, random access, checked, pixels not decoded.

A JSONL line is `{"image": "a/b.png", "intrinsics": [fx, fy, cx, cy, W, H], "pixel_coords": [[x, y], …],
"depth": [m, …]}`; W, H, `depth_kind` ("z" or "ray"), `dataset`, `pose` (camera-to-world, 3 or 4 rows of 4, metres) and
`scene` (a name: poses of one scene share a world) may be left out. A TFDS data set has features of the same names; a
pose of zeros is none. Whatever is wrong with a record is an InputError that starts with the record's id.
"""

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from depthlm_jax.config import Source
from depthlm_jax.data import index as record_index
from depthlm_jax.data.depth_record import DepthRecord, fail, field_of, record_of
from depthlm_jax.data.index import Progress
from depthlm_jax.errors import InputError

INDEX_BATCH = 256  # TFDS records whose images are in memory at a time
TEXTS = ("depth_kind", "dataset", "scene")


class Records(Protocol):
    """What a reader offers: `len(records)` and `records[i]`, from any thread, and pickling."""

    @property
    def index(self) -> np.ndarray:
        """What is known of each record without reading it: (records,) of data.index.ROW."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> DepthRecord: ...


def open_source(source: Source, progress: Progress | None = None) -> Records:
    """Returns the records of a .jsonl file, or of the folder of a prepared TFDS data set; local or gs://… and the like.

    Args:
      source: path, and what holds for records that do not say.
      progress: called with records done and in all while an index is built.

    Raises:
      InputError: no such file, folder or split; no record in it.
    """
    found = "nothing there"
    try:
        path = epath.Path(source.path)
        if path.suffix == ".jsonl" and path.is_file():
            found = "jsonl"
        elif (path / "dataset_info.json").is_file():
            found = "tfds"
        elif path.exists():
            found = "something else"
    except Exception as error:  # noqa: BLE001 remote file systems raise many kinds
        found = f"{type(error).__name__}: {error}"
    if found not in READERS:
        raise InputError(
            f"no data at source.path {source.path!r}", found=found,
            expected="a .jsonl file, or the folder of a prepared TFDS data set (with dataset_info.json in it)",
            fix="correct the path of this source, config.data.sources.<name>.path or config.eval.source.path; "
            "gs:// needs the package gcsfs, s3:// s3fs",
        )  # fmt: skip
    records = READERS[found](source, progress)
    if len(records) == 0:
        raise InputError(
            f"{source.path}: no records", found=f"0 records (split {source.split!r})", expected="at least 1",
            fix="fill the file, or widen the split",
        )  # fmt: skip
    return records


class JsonlRecords:
    """Records of a JSONL file; memory holds its index."""

    def __init__(self, source: Source, progress: Progress | None = None, index: np.ndarray | None = None):
        self._source = source
        self._path = epath.Path(source.path)
        self._image_root = epath.Path(source.image_root) if source.image_root else self._path.parent
        self.index = index if index is not None else self._cached_index(progress)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> DepthRecord:
        _check_index(index, len(self))
        record_id = f"{self._path.name}:{self.index['line'][index]}"
        try:
            with self._path.open("rb") as file:  # opened for each read: nothing shared between threads or processes
                file.seek(int(self.index["offset"][index]))
                line = file.readline()
        except Exception as error:  # noqa: BLE001 remote file systems raise many kinds
            fail(record_id, "cannot read line", error, "the file that was there before", "start again")
        fields = parse_line(record_id, line)
        defaults = {"depth_kind": self._source.depth_kind, "dataset": self._path.stem}
        image = self._read_image(record_id, field_of(record_id, fields, "image"))
        return record_of(record_id, defaults | fields | {"image": image}, self._source.fov_degrees)

    def __reduce__(self):
        return JsonlRecords, (self._source, None, _not_mapped(self.index))

    def _read_image(self, record_id: str, relative: object) -> bytes:
        fix = "correct the record's `image`, or the source's image_root"
        if not (isinstance(relative, str) and _stays_inside(relative)):
            fail(record_id, "image path leaves the image folder", relative, f"a path inside {self._image_root}", fix)
        try:
            return (self._image_root / relative).read_bytes()
        except Exception as error:  # noqa: BLE001 a null character, a lone surrogate, a remote file system's own kinds
            fail(record_id, f"cannot read image {relative!r}", error, f"a file inside {self._image_root}", fix)

    def _cached_index(self, progress: Progress | None) -> np.ndarray:
        source, path = self._source, self._path
        stamp = record_index.stamp_of(path)
        options = {"fov_degrees": source.fov_degrees, "image_root": source.image_root}

        def build() -> np.ndarray:
            with path.open("rb") as file:
                batches = record_index.jsonl_batches(file)
                report = record_index.with_estimate(progress, file, stamp["size"])
                return record_index.collect(batches, self._open_image, source.fov_degrees, report)

        return record_index.cached(path.parent / f"{path.name}.index", stamp | options, build)

    def _open_image(self, relative: object):
        if not (isinstance(relative, str) and _stays_inside(relative)):
            raise ValueError("no path inside the image folder")
        return (self._image_root / relative).open("rb")


def parse_line(record_id: str, line: bytes) -> dict:
    """Returns the JSON object of one line, or raises InputError."""
    fix = "write one complete JSON object a line, UTF-8; if the file changed during the run, start again"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        fail(record_id, "line is not JSON", f"{error}: {line[:80]!r}", "one JSON object", fix)
    if not isinstance(fields, dict):
        fail(record_id, "line is not a JSON object", type(fields).__name__, '{"image": …}', fix)
    return fields


class TfdsRecords:
    """Records of a prepared TFDS data set in ArrayRecord files, read without TensorFlow."""

    def __init__(self, source: Source, progress: Progress | None = None, index: np.ndarray | None = None):
        try:
            builder = tfds.builder_from_directory(source.path)
        except Exception as error:  # noqa: BLE001 TFDS raises many kinds for damaged metadata
            fail(source.path, "damaged data set", error, "dataset_info.json and features.json", "prepare it again")
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
        self._source, self._folder, self._info = source, epath.Path(source.path), builder.info
        self._progress, self._index = progress, index
        self._id = f"{builder.name}/{source.split}"
        self._defaults = {"depth_kind": source.depth_kind, "dataset": builder.name}
        kind = dict(builder.info.features.items()).get("depth_kind")
        self._kind_names = dict(enumerate(kind.names)) if isinstance(kind, tfds.features.ClassLabel) else {}

    @property
    def index(self) -> np.ndarray:
        if self._index is None:
            self._index = self._cached_index()
        return self._index

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> DepthRecord:
        _check_index(index, len(self))
        record_id = f"{self._id}:{index}"
        try:
            fields = {name: value.decode() if name in TEXTS and isinstance(value, bytes) else value
                      for name, value in self._rows[index].items()}  # fmt: skip
        except Exception as error:  # noqa: BLE001 ArrayRecord raises many kinds for a lost or cut shard
            fail(record_id, "cannot read record", error, "the complete files of the data set", "prepare it again")
        if self._kind_names:
            fields["depth_kind"] = self._kind_names.get(int(fields["depth_kind"]), fields["depth_kind"])
        if not np.any(fields.get("pose")):
            fields["pose"] = None
        return record_of(record_id, self._defaults | fields, self._source.fov_degrees)

    def __reduce__(self):
        return TfdsRecords, (self._source, None, _not_mapped(self._index))

    def _cached_index(self) -> np.ndarray:
        source, folder = self._source, self._folder
        stamp = {
            "data": record_index.stamp_of(folder / "dataset_info.json"),
            "split": source.split,
            "fov_degrees": source.fov_degrees,
        }

        def report(done: int) -> None:
            if self._progress is not None:
                self._progress(done, len(self))

        def build() -> np.ndarray:
            return record_index.collect(self._batches(), io.BytesIO, source.fov_degrees, report)

        name = re.sub(r"[^A-Za-z0-9]+", "_", source.split)
        return record_index.cached(folder / f"index-{name}.index", stamp, build)

    def _batches(self) -> Iterator[record_index.Batch]:
        """Yields what the index is made of; labels and images stay undecoded."""
        known = dict(self._info.features.items())
        wanted = {name: known[name] for name in ("image", "intrinsics", "scene", "pose") if name in known}
        features = tfds.features.FeaturesDict(wanted)
        for start in range(0, len(self), INDEX_BATCH):
            places = range(min(INDEX_BATCH, len(self) - start))
            todo = {place: self._entry(features, start + place) for place in places}
            yield record_index.Batch(np.zeros(len(places), record_index.ROW), todo)

    def _entry(self, features: tfds.features.FeaturesDict, index: int) -> record_index.Entry:
        try:
            row = features.deserialize_example_np(
                self._rows.data_source[index], decoders={"image": tfds.decode.SkipDecoding()}
            )
        except Exception:  # noqa: BLE001 told when the record is read
            row = {}
        scene = row.get("scene", b"").decode(errors="replace") if np.any(row.get("pose")) else ""
        intrinsics = row["intrinsics"].tolist() if "intrinsics" in row else None
        return record_index.Entry(0, 0, intrinsics, scene, row.get("image"))


READERS = {"jsonl": JsonlRecords, "tfds": TfdsRecords}


def _stays_inside(relative: str) -> bool:
    return not os.path.isabs(relative) and Path(os.path.normpath(relative)).parts[:1] != ("..",)


def _not_mapped(index: np.ndarray | None) -> np.ndarray | None:
    """Returns the index if a copy of the records needs it sent; a mapped one is mapped again over there."""
    return None if isinstance(index, np.memmap) else index


def _check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"record {index} of {length}")
