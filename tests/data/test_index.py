import dataclasses
import io
import json
import os
import pickle
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from depthlm_jax.config import Source
from depthlm_jax.data import index as record_index
from depthlm_jax.data import records

LINE = {"image": "a.png", "intrinsics": [500.5, 501.25, 31.5, 23.5, 64, 48], "pixel_coords": [[1, 2]], "depth": [3.5]}


def write(folder: Path, *lines: object) -> Source:
    path = folder / "train.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return Source(path=str(path))


def index_of(folder: Path, *lines: object) -> np.ndarray:
    return records.open_source(write(folder, *lines)).index


def save(path: Path, size: tuple[int, int], orientation: int = 1, kind: str = "JPEG") -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, kind, exif=exif)


def test_a_row_is_small_and_says_what_the_line_says(tmp_path):
    (row,) = index_of(tmp_path, LINE)
    assert record_index.ROW.itemsize <= 64
    assert row.tolist() == (0, 500.5, 501.25, 1, 64, 48, 0)


def test_offsets_and_numbers_skip_blank_lines_also_across_blocks(tmp_path):
    line = json.dumps(LINE).encode()
    lines = [line, b"", b" \t\r", *[line + b" " * (n % 7) for n in range(5000)], b"\r", line]
    source = write(tmp_path, *lines)
    content = Path(source.path).read_bytes()
    assert len(content) > 2 * record_index.BLOCK_BYTES
    index = records.open_source(source).index
    expected = [number for number, text in enumerate(content.split(b"\n"), start=1) if text.strip()]
    assert index["line"].tolist() == expected
    for row in index[:: len(index) // 50]:
        assert json.loads(content[row["offset"] : content.index(b"\n", row["offset"])]) == LINE
    assert (index["fx"] == 500.5).all() and (index["height"] == 48).all()


def with_text(text: str) -> bytes:
    return json.dumps(LINE | {"dataset": text}).encode()


TRICKY = {  # lines whose bytes could be read wrongly
    "in_a_text": json.dumps({"dataset": '"intrinsics": [1, 2, 3, 4, 5, 6],'} | LINE).encode(),
    "nested_before": json.dumps({"other": {"intrinsics": [1, 2, 3, 4, 5, 6]}} | LINE).encode(),
    "nested_after": json.dumps(LINE | {"other": {"intrinsics": [1, 2, 3, 4, 5, 6]}}).encode(),
    "escaped_key": json.dumps(LINE).replace('"intrinsics"', '"intr\\u0069nsics"').encode(),
    "twice": json.dumps(LINE).replace("{", '{"intrinsics": [1, 2, 3, 4, 5, 6], ', 1).encode(),
    "as_a_value": with_text("intrinsics"),
    "brace_in_a_text": with_text("{"),
    "spaces": json.dumps(LINE, indent=1).replace("\n", " ").replace(":", " :\t").encode(),
    "carriage_return": json.dumps(LINE).encode() + b"\r",
    "byte_order_mark": b"\xef\xbb\xbf" + json.dumps(LINE).encode(),
    "exponents": json.dumps(LINE).replace("500.5", "5.005E+2").encode(),
    "umlaut": json.dumps(LINE | {"dataset": "Bär"}, ensure_ascii=False).encode(),
}


@pytest.mark.parametrize("line", TRICKY.values(), ids=TRICKY.keys())
def test_the_index_says_what_a_parser_says(tmp_path, line):
    assert json.loads(line)["intrinsics"] == LINE["intrinsics"]
    (row,) = index_of(tmp_path, line)
    assert row.tolist() == (0, 500.5, 501.25, 1, 64, 48, 0)


DAMAGED = {
    "cut": b'{"image": "a.png", "intrin',
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "no_text": b"\xff\xfe\x00{",
    "texts": json.dumps(LINE | {"intrinsics": ["1"] * 6}).encode(),
    "null": json.dumps(LINE | {"intrinsics": None}).encode(),
    "five": json.dumps(LINE | {"intrinsics": [1.0] * 5}).encode(),
    "huge": json.dumps(LINE | {"intrinsics": [10**400, 1, 1, 1, 64, 48]}).encode(),
    "infinite": json.dumps(LINE).replace("500.5", "1e999").encode(),
    "nan": json.dumps(LINE).replace("500.5", "NaN").encode(),
    "negative": json.dumps(LINE).replace("500.5", "-500.5").encode(),
    "leading_zero": json.dumps(LINE).replace("500.5", "0500.5").encode(),
    "outside": json.dumps(LINE | {"image": "../a.png", "intrinsics": None}).encode(),
}


@pytest.mark.parametrize("line", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_line_costs_its_own_row_only(tmp_path, line):
    rows = index_of(tmp_path, LINE, line, LINE)
    assert rows["line"].tolist() == [1, 2, 3]
    assert np.isnan(rows["fx"]).tolist() == [False, True, False]
    assert rows["offset"][1] == len(json.dumps(LINE)) + 1


@pytest.mark.parametrize("size", [[0, 48], [-64, 48], [64.5, 48], [2**40, 48]])
def test_a_bad_declared_size_is_not_taken(tmp_path, size):
    (row,) = index_of(tmp_path, LINE | {"intrinsics": [500, 500, 31, 23, *size]})
    assert (row["width"], row["height"]) == (0, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation, expected", [(1, (64, 48)), (3, (64, 48)), (6, (48, 64)), (8, (48, 64))])
def test_an_undeclared_size_is_that_of_the_upright_image(tmp_path, kind, orientation, expected):
    save(tmp_path / "a.png", (64, 48), orientation, kind)
    (row,) = index_of(tmp_path, LINE | {"intrinsics": [500, 501, 31, 23]})
    assert (row["fx"], row["fy"], row["width"], row["height"]) == (500, 501, *expected)


def test_undeclared_sizes_of_many_images_stay_with_their_lines(tmp_path):
    for number in range(40):
        save(tmp_path / f"{number}.png", (100 + number, 50))
    lines = [LINE | {"image": f"{number}.png", "intrinsics": [500, 501, 31, 23]} for number in range(40)]
    rows = index_of(tmp_path, LINE, *lines, LINE | {"image": "none.png", "intrinsics": [500, 501, 31, 23]})
    assert rows["width"].tolist() == [64, *range(100, 140), 0]


def test_a_scene_counts_only_with_a_pose(tmp_path):
    pose = np.eye(4).tolist()
    rows = index_of(
        tmp_path,
        LINE | {"scene": "a", "pose": pose}, LINE | {"scene": "a"}, LINE | {"scene": "a", "pose": None},
        LINE | {"scene": "", "pose": pose}, LINE | {"pose": pose}, LINE | {"scene": 'a "quoted" {', "pose": pose},
        json.dumps(LINE | {"scene": "ä", "pose": pose}, ensure_ascii=False).encode(),
    )  # fmt: skip
    names = ["a", "", "", "", "", 'a "quoted" {', "ä"]
    assert rows["scene"].tolist() == [zlib.crc32(name.encode()) for name in names]


def test_the_cache_is_mapped_and_not_built_again(tmp_path):
    source, calls = write(tmp_path, *[LINE] * 10), []
    first = records.open_source(source, lambda done, total: calls.append((done, total)))
    assert calls == [(10, 10)] and isinstance(first.index, np.memmap)
    second = records.open_source(source, lambda done, total: calls.append((done, total)))
    assert len(calls) == 1
    np.testing.assert_array_equal(first.index, second.index)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "train.jsonl.index"]


def rewrite_same_size(source: Source) -> None:
    path = Path(source.path)
    status = path.stat()
    path.write_text(path.read_text().replace("500.5", "900.5"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as within one tick of the file system's clock


def append_line(source: Source) -> None:
    with Path(source.path).open("a") as file:
        file.write(json.dumps(LINE) + "\n")


def change_cache(change):
    def apply(source: Source) -> None:
        cache = Path(source.path + ".index")
        cache.write_bytes(change(cache.read_bytes()))

    return apply


STALE = {
    "longer": append_line,
    "touched": lambda source: os.utime(source.path, ns=(0, time.time_ns() + 10**9)),
    "same_size_and_time": rewrite_same_size,
    "cut": change_cache(lambda content: content[:-1]),
    "too_long": change_cache(lambda content: content + b"0"),
    "foreign": change_cache(lambda content: b"PK\3\4" + content),
    "empty": change_cache(lambda content: b""),
}


@pytest.mark.parametrize("spoil", STALE.values(), ids=STALE.keys())
def test_a_cache_that_does_not_fit_is_rebuilt(tmp_path, spoil):
    source, calls = write(tmp_path, *[LINE] * 3), []
    records.open_source(source)
    spoil(source)
    index = records.open_source(source, lambda *_: calls.append(1)).index
    lines = Path(source.path).read_text().splitlines()
    assert calls
    assert index["fx"].tolist() == [json.loads(line)["intrinsics"][0] for line in lines]


def test_options_that_change_rows_are_part_of_the_stamp(tmp_path):
    (tmp_path / "wide").mkdir()
    save(tmp_path / "a.png", (64, 48))
    save(tmp_path / "wide" / "a.png", (128, 48))
    path = write(tmp_path, {name: value for name, value in LINE.items() if name != "intrinsics"}).path
    for source, fx, width in (
        (Source(path), np.nan, 64),
        (Source(path, fov_degrees=90), 32, 64),
        (Source(path, fov_degrees=90, image_root=str(tmp_path / "wide")), 64, 128),
        (Source(path), np.nan, 64),
    ):
        (row,) = records.open_source(source).index
        np.testing.assert_allclose([row["fx"], row["fy"], row["width"]], [fx, fx, width])


def test_a_folder_that_cannot_be_written_leaves_the_index_among_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "data").mkdir()
    tmp_path = tmp_path / "data"
    source = write(tmp_path, LINE, LINE)
    (tmp_path / "train.jsonl.index").mkdir()  # in the way, also for a user who may write everything
    opened = records.open_source(source)
    assert isinstance(opened.index, np.memmap)  # other processes share it
    calls = []
    records.open_source(source, lambda *_: calls.append(1))
    assert calls == []  # and none builds it again
    copy = pickle.loads(pickle.dumps(opened))
    second_line = len(json.dumps(LINE)) + 1
    assert opened.index.tolist() == [(0, 500.5, 501.25, 1, 64, 48, 0), (second_line, 500.5, 501.25, 2, 64, 48, 0)]
    assert copy.index.tolist() == opened.index.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "train.jsonl.index"]


def test_an_image_out_of_reach_is_looked_for_again(tmp_path):
    unsized = {**LINE, "intrinsics": LINE["intrinsics"][:4]}
    source = write(tmp_path, unsized, unsized)
    hidden = tmp_path / LINE["image"]
    assert records.open_source(source).index["width"].tolist() == [0, 0]
    save(hidden, (64, 48))
    assert records.open_source(source).index["width"].tolist() == [64, 64]
    hidden.write_bytes(b"no image")  # what is no image stays none
    (tmp_path / "train.jsonl.index").unlink()
    assert records.open_source(source).index["width"].tolist() == [0, 0]
    assert (tmp_path / "train.jsonl.index").is_file()


def test_options_have_files_of_their_own(tmp_path):
    plain = write(tmp_path, LINE)
    calls = []
    wide, elsewhere = dataclasses.replace(plain, fov_degrees=60), dataclasses.replace(plain, image_root=str(tmp_path))
    for source in (plain, wide, elsewhere) * 2:
        opened = records.open_source(source, lambda *_: calls.append(1))
        assert Path(opened.index_file).is_file()
    assert len(calls) == 3


def test_another_spelling_of_the_path_finds_the_same_index(tmp_path, monkeypatch):
    records.open_source(write(tmp_path, LINE))
    monkeypatch.chdir(tmp_path)
    calls = []
    opened = records.open_source(Source("train.jsonl"), lambda *_: calls.append(1))
    assert len(opened.index) == 1 and calls == []


CAMERAS = {
    "none": (None, True), "zeros": ([0, 0, 1, 1], True), "float_zeros": (np.zeros(6), True),
    "known": ([5, 5, 1, 1], False), "matrix": (np.zeros((4, 4)), False), "nested": ([[0] * 4] * 4, False),
    "scalar": (np.array(0.0), False), "text": ("0000", False), "half": ([0, 5, 1, 1], False),
}  # fmt: skip


@pytest.mark.parametrize("intrinsics, unknown", CAMERAS.values(), ids=CAMERAS.keys())
def test_a_camera_is_unknown_only_where_it_is_left_open(intrinsics, unknown):
    assert record_index.is_unknown(intrinsics) is unknown


def test_a_pickle_of_a_mapped_index_is_small(tmp_path):
    opened = records.open_source(write(tmp_path, *[LINE] * 1000))
    assert len(pickle.dumps(opened)) < 2000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(opened)).index, opened.index)


def test_building_takes_less_than_100_bytes_a_record(tmp_path):
    count = 60_000
    source = write(tmp_path, *[json.dumps(LINE).encode()] * count)
    records.open_source(write(tmp_path, LINE))  # what is imported once does not count
    source = write(tmp_path, *[json.dumps(LINE).encode()] * count)
    tracemalloc.start()
    opened = records.open_source(source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(opened) == count
    assert peak <= 100 * count


def test_a_progress_total_is_an_estimate_that_ends_exact():
    reports, file = [], io.BytesIO(b"x" * 1000)
    report = record_index.with_estimate(lambda done, total: reports.append((done, total)), file, 1000)
    file.seek(250)
    report(5)
    file.seek(1000)
    report(20)
    assert reports == [(5, 20), (20, 20)]
