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
LEVELS_BELOW, MOST_NAMED = 3, 5  # where a wrong path is a folder: how deep data is looked for, and how much is told
TEXTS = ("depth_kind", "dataset", "scene")


class Records(Protocol):
    """What a reader offers: `len(records)` and `records[i]`, from any thread, and pickling."""

    @property
    def index(self) -> np.ndarray:
        """What is known of each record without reading it: (records,) of data.index.ROW."""

    @property
    def index_file(self) -> str:
        """Where the index is kept if that can be written; a file that may be removed at any time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> DepthRecord: ...


def open_source(source: Source, progress: Progress | None = None, field: str = "data.sources.NAME") -> Records:
    """Returns the records of a .jsonl file, or of the folder of a prepared TFDS data set; local or gs://… and the like.

    Args:
      source: path, and what holds for records that do not say.
      progress: called with records done and in all while an index is built.
      field: of the config that holds the source, or the flag that gives its path (`--input`): errors name it.

    Raises:
      InputError: no such file, folder or split; no record in it.
    """
    flag = field if field.startswith("--") else f"--config.{field}.path"
    found = "empty"
    try:
        if source.path:
            found = _kind_of(epath.Path(source.path))
    except Exception as error:  # noqa: BLE001 remote file systems raise many kinds
        found = f"{type(error).__name__}: {error}"
    if found not in READERS:
        remote = "" if record_index.is_local(source.path) else "; gs:// needs the package gcsfs, s3:// s3fs"
        raise InputError(
            f"no data at source.path {source.path!r}", found=found,
            expected="a .jsonl file, or the folder of a prepared TFDS data set (with dataset_info.json in it)",
            fix=f"set {flag}=…{remote}",
        )  # fmt: skip
    records = READERS[found](source, progress)
    if len(records) == 0:
        raise InputError(
            f"{source.path}: no records", found=f"0 records (split {source.split!r})", expected="at least 1",
            fix=f"fill the file, widen the split, or set {flag}=…",
        )  # fmt: skip
    return records


def _kind_of(path: epath.Path) -> str:
    """Returns the name of a reader, or what is there instead."""
    if path.suffix == ".jsonl" and path.is_file():
        return "jsonl"
    if (path / "dataset_info.json").is_file():
        return "tfds"
    if not path.exists():
        return "nothing there"
    if not path.is_dir():
        return "a file whose name does not end in .jsonl"
    below = _data_below(Path(path)) if record_index.is_local(path) else []
    return f"a folder; below it: {', '.join(below)}" if below else "a folder without dataset_info.json"


def _data_below(folder: Path) -> list[str]:
    """Returns some of what `open_source` would read, on the first level below the folder that has any."""
    for depth in range(LEVELS_BELOW):
        parents = "*/" * depth
        prepared = [file.parent for file in folder.glob(f"{parents}*/dataset_info.json")]
        if near := [*folder.glob(f"{parents}*.jsonl"), *prepared]:
            return [os.fspath(path) for path in sorted(near)[:MOST_NAMED]]
    return []


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

    @property
    def index_file(self) -> str:
        return os.fspath(self._path.parent / record_index.file_name(self._path.name, self._index_options()))

    def _index_options(self) -> dict:
        return {"fov_degrees": self._source.fov_degrees, "image_root": self._source.image_root}

    def _cached_index(self, progress: Progress | None) -> np.ndarray:
        stamp = record_index.stamp_of(self._path)

        def build() -> tuple[np.ndarray, bool]:
            with self._path.open("rb") as file:
                batches = record_index.jsonl_batches(file)
                report = record_index.with_estimate(progress, file, stamp["size"])
                return record_index.collect(batches, self._open_image, self._source.fov_degrees, report)

        return record_index.cached(epath.Path(self.index_file), stamp | self._index_options(), build)

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

    @property
    def index_file(self) -> str:
        return os.fspath(tfds_index_file(self._folder, self._source.split, self._source.fov_degrees))

    def _cached_index(self) -> np.ndarray:
        def report(done: int) -> None:
            if self._progress is not None:
                self._progress(done, len(self))

        def build() -> tuple[np.ndarray, bool]:
            return record_index.collect(self._batches(), io.BytesIO, self._source.fov_degrees, report)

        stamp = tfds_stamp(self._folder, self._source.split, self._source.fov_degrees)
        return record_index.cached(epath.Path(self.index_file), stamp, build)

    def _batches(self) -> Iterator[record_index.Batch]:
        features = index_features(self._info.features)
        for start in range(0, len(self), INDEX_BATCH):
            places = range(min(INDEX_BATCH, len(self) - start))
            todo = {place: index_entry(features, self._serialized(start + place)) for place in places}
            yield record_index.Batch(np.zeros(len(places), record_index.ROW), todo)

    def _serialized(self, index: int) -> bytes:
        try:
            return self._rows.data_source[index]
        except Exception:  # noqa: BLE001 told when the record is read
            return b""


def tfds_index_file(folder: epath.Path, split: str, fov_degrees: float) -> epath.Path:
    """Returns where the index of a split of a data set is kept."""
    part = "" if split.isidentifier() else split  # of a slice, the name of the split is not enough
    stem = "index-" + re.match(r"\w*", split)[0]
    return folder / record_index.file_name(stem, {"split": part, "fov_degrees": fov_degrees})


def tfds_stamp(folder: epath.Path, split: str, fov_degrees: float) -> dict:
    """Returns what the index of a split was made from."""
    data = record_index.stamp_of(folder / "dataset_info.json")
    return {"data": data, "split": split, "fov_degrees": float(fov_degrees)}


def index_features(known: tfds.features.FeaturesDict) -> tfds.features.FeaturesDict:
    """Returns the features that the index is made of."""
    wanted = ("image", "intrinsics", "scene", "pose")
    return tfds.features.FeaturesDict({name: known[name] for name in wanted if name in known})


def index_entry(features: tfds.features.FeaturesDict, serialized: bytes) -> record_index.Entry:
    """Returns what the index of a record is made of; labels and image stay undecoded."""
    try:
        row = features.deserialize_example_np(serialized, decoders={"image": tfds.decode.SkipDecoding()})
        scene = row.get("scene", b"").decode(errors="replace") if np.any(row.get("pose")) else ""
        intrinsics = row["intrinsics"].tolist() if "intrinsics" in row else None
    except Exception:  # noqa: BLE001 told when the record is read
        return record_index.Entry(0, 0, None, "", b"")
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
