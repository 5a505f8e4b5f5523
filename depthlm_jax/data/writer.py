"""The `depth_records` format: ArrayRecord files that TFDS opens, written in parallel shards, without TensorFlow.

Features, named as in a JSONL record: image (bytes of the image file, kept), intrinsics (fx, fy, cx, cy, W, H),
pixel_coords, depth, depth_kind, dataset, pose (zeros: none), scene. Record i of a split is example i.

A data set grows in a folder of its own beside the final one, and is moved into place whole, with the index of each
split, so that its first opening takes no time.
"""

import concurrent.futures
import dataclasses
import io
import multiprocessing
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from PIL import Image

from depthlm_jax import files
from depthlm_jax.data import index as record_index
from depthlm_jax.data import records as record_readers
from depthlm_jax.data.depth_record import DepthRecord, fail, validate
from depthlm_jax.data.images import decode_image
from depthlm_jax.data.records import Records
from depthlm_jax.errors import InputError

FILENAMES = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
MADE_OF = "made_of.json"  # in the folder, if whoever writes the data set keeps one
POLL_SECONDS = 0.5
JPEG_QUALITY = 95
MAX_POSE_ERROR_M = 1e-3  # of storing a pose as float32
ExampleOf = Callable[[int], dict]  # index → features; raises InputError if there is none


@dataclasses.dataclass(frozen=True)
class Shard:
    split: str
    number: int  # among all shards of all splits
    file: Path
    indices: range


@dataclasses.dataclass(frozen=True)
class Written:
    length: int
    num_bytes: int
    bad: tuple[str, ...]  # why an index gave no record
    index: np.ndarray  # (length,) of data.index.ROW


def features() -> tfds.features.FeaturesDict:
    """Returns the TFDS features of `depth_records`."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "intrinsics": tfds.features.Tensor(shape=(6,), dtype=np.float32),
            "pixel_coords": tfds.features.Tensor(shape=(None, 2), dtype=np.float32),
            "depth": tfds.features.Tensor(shape=(None,), dtype=np.float32),
            "depth_kind": tfds.features.ClassLabel(names=["z", "ray"]),
            "dataset": tfds.features.Text(),
            "pose": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
            "scene": tfds.features.Text(),
        }
    )


@dataclasses.dataclass(frozen=True)
class RecordExamples:
    """The example of each record of a source; see `example`."""

    records: Records
    focal_px: float

    def __call__(self, index: int) -> dict:
        return example(self.records[index], self.focal_px)


def example(record: DepthRecord, focal_px: float) -> dict:
    """Returns the features of a record.

    Args:
      record: as read.
      focal_px: an image whose focal length is larger is stored resized to this one, each axis by itself, and is never
        enlarged; 0: the image file is kept as it is.

    Raises:
      InputError: the image cannot be decoded; a number is lost in float32.
    """
    rgb_HW3 = decode_image(record)
    size = np.array([rgb_HW3.shape[1], rgb_HW3.shape[0]])
    wanted = np.minimum(1, focal_px / record.intrinsics[:2]) if focal_px else np.ones(2)
    new_size = np.maximum(1, np.round(size * wanted)).astype(int)
    scale = new_size / size
    if (new_size == size).all():
        image, camera, points_N2 = record.image, record.intrinsics, record.pixel_coords
    else:
        image = _resize(record.image, rgb_HW3, (int(new_size[0]), int(new_size[1])))
        centre = (record.intrinsics[2:] + 0.5) * scale - 0.5
        camera = np.concatenate([record.intrinsics[:2] * scale, centre])
        points_N2 = (record.pixel_coords + 0.5) * scale - 0.5
    last_inside = np.nextafter(np.float32(new_size - 0.5), np.float32(-1))
    stored = dataclasses.replace(
        record,
        intrinsics=np.float32(camera),
        pixel_coords=np.minimum(np.float32(points_N2), last_inside),
        depth_m=np.float32(record.depth_m),
        size=(int(new_size[0]), int(new_size[1])),
        pose=None if record.pose is None else _pose(record),
    )
    validate(stored)
    return {
        "image": image,
        "intrinsics": np.array([*stored.intrinsics, *new_size], np.float32),
        "pixel_coords": stored.pixel_coords,
        "depth": stored.depth_m,
        "depth_kind": record.depth_kind,
        "dataset": record.dataset.encode(errors="replace"),
        "pose": np.zeros((4, 4), np.float32) if stored.pose is None else stored.pose,
        "scene": record.scene.encode(errors="replace"),
    }


def _resize(image: bytes, rgb_HW3: np.ndarray, size: tuple[int, int]) -> bytes:
    """Returns the upright image at a smaller size, encoded: JPEG stays JPEG, all else becomes PNG."""
    encoded, smaller = io.BytesIO(), Image.fromarray(rgb_HW3).resize(size, Image.Resampling.BICUBIC)
    with Image.open(io.BytesIO(image)) as original:
        is_jpeg = original.format in ("JPEG", "MPO")
    if is_jpeg:
        smaller.save(encoded, "JPEG", quality=JPEG_QUALITY)
    else:
        smaller.save(encoded, "PNG")
    return encoded.getvalue()


def _pose(record: DepthRecord) -> np.ndarray:
    pose = np.float32(record.pose)
    if np.abs(pose - record.pose).max() > MAX_POSE_ERROR_M:
        fail(record.record_id, "pose is too far from its world's origin", f"{record.pose[:3, 3].tolist()} m",
             f"float32 keeps it to {MAX_POSE_ERROR_M} m", "subtract one place of the scene from its poses")  # fmt: skip
    return pose


def write(
    folder: Path,
    name: str,
    splits: dict[str, tuple[int, ExampleOf]],
    shards: int = 1,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    max_bad_records: int = 0,
    on_bad: Callable[[str], None] | None = None,
) -> Path:
    """Returns `folder` with the data set in it, to be given as `Source.path`; writes it unless it is there, complete.

    Args:
      folder: its last part is the version, for example `1.0.0`.
      name: of the data set; lower case, digits, _.
      splits: name → (number of records, example of an index: a dict of `features()`, a missing pose or scene is none).
      shards: files of a split.
      workers: processes; with more than one, the examples must be picklable, and the program's main module guarded by
        `if __name__ == "__main__"`.
      progress: called with records done and in all.
      max_bad_records: so many indices whose example raises InputError are left out.
      on_bad: called with the text of each such error.

    Raises:
      InputError: too many bad records; no good one; `folder` cannot be written or holds something else.
    """
    if (folder / "dataset_info.json").is_file():
        return folder
    _clear(folder, name)
    files.make_writable(folder.parent)
    unfinished = folder.with_name(f"{folder.name}.incomplete-{uuid.uuid4().hex[:8]}")
    unfinished.mkdir()
    try:
        plan = list(_plan(unfinished, name, splits, shards))
        tally = _Tally(name, sum(count for count, _ in splits.values()), max_bad_records, progress, on_bad)
        done = (_write_in_processes if workers > 1 else _write_here)(plan, splits, tally, workers, unfinished)
        _write_metadata(unfinished, folder.name, plan, done)
        _write_index(epath.Path(unfinished), plan, done)
        _move(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _clear(folder: Path, name: str) -> None:
    """Removes what is left of a data set without metadata; never anything else."""
    known = (f"{name}-*.array_record-*", "*.labels.txt", "features.json", "index-*.index", MADE_OF)
    strangers = [file.name for file in folder.glob("*") if not any(file.match(pattern) for pattern in known)]
    if strangers:
        raise InputError(
            f"{folder}: not a folder for data set {name!r}", found=f"files {sorted(strangers)[:5]}",
            expected="nothing there, or a data set with dataset_info.json", fix="give another --output",
        )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)


def _plan(folder: Path, name: str, splits: dict[str, tuple[int, ExampleOf]], shards: int) -> Iterator[Shard]:
    number = 0
    for split, (count, _) in splits.items():
        parts = max(1, min(shards, count))
        edges = [count * part // parts for part in range(parts + 1)]
        for part in range(parts):
            file = folder / f"{name}-{split}.array_record-{part:05}-of-{parts:05}"
            yield Shard(split, number, file, range(edges[part], edges[part + 1]))
            number += 1


@dataclasses.dataclass
class _Tally:
    """What has been written so far; stops the work when too much of it is bad."""

    name: str
    total: int
    max_bad_records: int
    progress: Callable[[int, int], None] | None
    on_bad: Callable[[str], None] | None
    bad: int = 0

    def report(self, done: int) -> None:
        if self.progress is not None and done:
            self.progress(done, self.total)

    def add(self, written: Written) -> None:
        self.bad += len(written.bad)
        if self.bad > self.max_bad_records:
            raise InputError(
                f"{self.name}: {self.bad} bad records", found=written.bad[-1],
                expected=f"at most {self.max_bad_records}",
                fix="correct them, or leave out up to N of them with --max_bad_records=N",
            )  # fmt: skip
        for text in written.bad:
            if self.on_bad is not None:
                self.on_bad(text)


def _write_here(
    plan: list[Shard], splits: dict[str, tuple[int, ExampleOf]], tally: _Tally, workers: int, folder: Path
) -> dict[int, Written]:
    """Returns shard number → what was written, in this process."""
    done, results = 0, {}

    def tick() -> bool:
        nonlocal done
        done += 1
        tally.report(done)
        return False

    for shard in plan:
        results[shard.number] = _write_shard(shard, splits[shard.split][1], tally.max_bad_records, tick)
        tally.add(results[shard.number])
    return results


def _write_in_processes(
    plan: list[Shard], splits: dict[str, tuple[int, ExampleOf]], tally: _Tally, workers: int, folder: Path
) -> dict[int, Written]:
    """Returns shard number → what was written, by spawned processes that count in a mapped file."""
    counter = folder / "progress"
    counts = np.memmap(counter, np.int64, "w+", shape=(len(plan) + 1,))  # the last: stop
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(plan)), mp_context=multiprocessing.get_context("spawn")
    )
    try:
        running = {
            pool.submit(_write_counted, shard, splits[shard.split][1], tally.max_bad_records, counter, len(plan)): shard
            for shard in plan
        }
        results, waiting = {}, set(running)
        while waiting:
            finished, waiting = concurrent.futures.wait(
                waiting, POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                results[running[future].number] = future.result()
                tally.add(future.result())
            tally.report(int(counts[:-1].sum()))
    finally:
        counts[-1] = 1
        pool.shutdown(cancel_futures=True)
    counter.unlink()
    return results


def _write_counted(shard: Shard, example_of: ExampleOf, max_bad: int, counter: Path, shards: int) -> Written:
    counts = np.memmap(counter, np.int64, "r+", shape=(shards + 1,))

    def tick() -> bool:
        counts[shard.number] += 1
        return bool(counts[-1])

    return _write_shard(shard, example_of, max_bad, tick)


def _write_shard(shard: Shard, example_of: ExampleOf, max_bad: int, tick: Callable[[], bool]) -> Written:
    """Writes a shard, as far as `tick` does not say stop and not more than `max_bad` examples are missing."""
    layout, num_bytes, bad, index_rows = features(), 0, [], bytearray()
    indexed = record_readers.index_features(layout)
    unfinished = shard.file.with_name(f"{shard.file.name}.unfinished")
    writer = ArrayRecordWriter(os.fspath(unfinished), "group_size:1")  # one record a group: random access
    try:
        for index in shard.indices:
            try:
                example = {"pose": np.zeros((4, 4), np.float32), "scene": ""} | example_of(index)
            except InputError as error:
                bad.append(str(error))
            else:
                record = layout.serialize_example(layout.encode_example(example))
                writer.write(record)
                num_bytes += len(record)
                entry = record_readers.index_entry(indexed, record)
                index_rows += record_index.row_of(entry, io.BytesIO, 0).tobytes()
            if tick() or len(bad) > max_bad:
                break
    finally:
        writer.close()
    unfinished.replace(shard.file)
    rows = np.frombuffer(index_rows, record_index.ROW)
    return Written(len(rows), num_bytes, tuple(bad), rows)


def _write_metadata(folder: Path, version: str, plan: list[Shard], done: dict[int, Written]) -> None:
    template = tfds.core.ShardedFileTemplate(data_dir=folder, template=FILENAMES)
    infos = []
    for split in dict.fromkeys(shard.split for shard in plan):
        parts = [done[shard.number] for shard in plan if shard.split == split]
        if not any(part.length for part in parts):
            raise InputError(
                f"split {split!r}: no records", found=f"{sum(len(part.bad) for part in parts)} bad ones",
                expected="at least 1 good one", fix="correct the records, or leave the split out",
            )  # fmt: skip
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[part.length for part in parts],
                num_bytes=sum(part.num_bytes for part in parts),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features(),
        split_infos=infos,
        version=version,
        filename_template=FILENAMES,
        check_data=False,
        description="Images with metric depth at some of their pixels.",
    )


def _write_index(folder: epath.Path, plan: list[Shard], done: dict[int, Written]) -> None:
    for split in dict.fromkeys(shard.split for shard in plan):
        rows = np.concatenate([done[shard.number].index for shard in plan if shard.split == split])
        file = record_readers.tfds_index_file(folder, split, fov_degrees=0)
        record_index.store(file, record_readers.tfds_stamp(folder, split, fov_degrees=0), rows)


def _move(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:  # another process was first to move its copy into place
        if not (folder / "dataset_info.json").is_file():
            raise
