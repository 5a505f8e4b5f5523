import io
import json
import pickle
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from depthlm_jax.config import Source
from depthlm_jax.data import images, records, synthetic
from depthlm_jax.errors import InputError

IBIMS = Path(__file__).parents[2].parent / "shared" / "data" / "ibims1" / "ibims1_subset.jsonl"
GOOD = {
    "image": "rgb/a.png", "intrinsics": [30.0, 31.0, 19.5, 14.5, 40, 30],
    "pixel_coords": [[0, 0], [39, 29], [10.25, 7]], "depth": [1.0, 2.5, 7],
}  # fmt: skip


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rgb").mkdir()
    (tmp_path / "rgb" / "a.png").write_bytes(encode(noise()))
    return tmp_path


def write(folder: Path, *lines: object) -> Source:
    path = folder / "train.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return Source(path=str(path))


def message(action, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        action(*arguments)
    return str(caught.value)


def record_of(folder: Path, **changes) -> records.DepthRecord:
    return records.open_source(write(folder, GOOD | changes))[0]


def test_a_jsonl_record_keeps_every_value(folder):
    record = record_of(folder)
    assert (record.record_id, record.depth_kind, record.dataset, record.size) == (
        "train.jsonl:1",
        "z",
        "train",
        (40, 30),
    )
    assert record.intrinsics.tolist() == GOOD["intrinsics"][:4]
    assert record.pixel_coords.tolist() == GOOD["pixel_coords"]
    assert record.depth_m.tolist() == GOOD["depth"]
    assert {array.dtype for array in (record.intrinsics, record.pixel_coords, record.depth_m)} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(images.decode_image(record), np.asarray(noise()))


def test_what_a_record_says_wins_over_the_source(folder):
    source = write(folder, GOOD, GOOD | {"depth_kind": "z", "dataset": "nyu"})
    opened = records.open_source(Source(path=source.path, depth_kind="ray"))
    assert [(r.depth_kind, r.dataset) for r in opened] == [("ray", "train"), ("z", "nyu")]


def test_four_intrinsics_leave_the_size_open(folder):
    assert record_of(folder, intrinsics=GOOD["intrinsics"][:4]).size is None


def test_image_root_is_where_paths_start(folder):
    source = write(folder, GOOD | {"image": "a.png"})
    assert records.open_source(Source(path=source.path, image_root=str(folder / "rgb")))[0].image


def test_each_line_is_found_across_blank_and_multibyte_ones(folder):
    names = ["ä" * n for n in range(1, 9)]
    lines = [text for name in names for text in (json.dumps(GOOD | {"dataset": name}, ensure_ascii=False), "  ")]
    opened = records.open_source(write(folder, *lines))
    assert [record.dataset for record in opened] == names
    assert opened[7].record_id == "train.jsonl:15"
    assert opened.index["line"].tolist() == list(range(1, 16, 2))
    with pytest.raises(IndexError, match="record 8 of 8"):
        opened[8]


def test_the_last_line_needs_no_newline(folder):
    source = write(folder, GOOD)
    Path(source.path).write_text(Path(source.path).read_text().rstrip())
    assert len(records.open_source(source)[0].depth_m) == 3


def test_threads_and_pickles_read_the_same(folder):
    opened = records.open_source(write(folder, *(GOOD | {"depth": [1, 2, 3 + n]} for n in range(200))))
    copy = pickle.loads(pickle.dumps(opened))
    with ThreadPoolExecutor(8) as pool:
        last = list(pool.map(lambda n: copy[n].depth_m[2], range(200)))
    assert last == [3 + n for n in range(200)]


BAD_RECORDS = {
    "missing_key": ({"depth": ...}, "'depth' is missing"),
    "missing_image_key": ({"image": ...}, "'image' is missing"),
    "lengths": ({"depth": [1.0]}, "pixel_coords and depth differ in length\n  found:    3 points, 1 depths"),
    "intrinsics_count": ({"intrinsics": [1.0] * 5}, "wrong number of intrinsics\n  found:    5 numbers"),
    "zero_depth": ({"depth": [1, 0, 1]}, "depth is not a positive finite number\n  found:    0.0 m at point 1"),
    "negative_depth": ({"depth": [1, 1, -2]}, "found:    -2.0 m at point 2"),
    "nan_depth": ({"depth": [float("nan"), 1, 1]}, "found:    nan m at point 0"),
    "infinite_depth": ({"depth": [float("inf"), 1, 1]}, "found:    inf m at point 0"),
    "zero_focal": ({"intrinsics": [0, 31, 19.5, 14.5]}, "bad intrinsics\n  found:    [0.0, 31.0"),
    "nan_focal": ({"intrinsics": [30, float("nan"), 19.5, 14.5]}, "bad intrinsics\n  found:    [30.0, nan"),
    "nan_centre": ({"intrinsics": [30, 31, float("nan"), 14.5]}, "bad intrinsics"),
    "fractional_size": ({"intrinsics": [30, 31, 19.5, 14.5, 40.5, 30]}, "bad image size W, H\n  found:    [40.5"),
    "right_of_image": ({"pixel_coords": [[0, 0], [39.5, 3], [1, 1]]}, "found:    [39.5, 3.0] at point 1"),
    "above_image": ({"pixel_coords": [[0, -1], [3, 3], [1, 1]]}, "found:    [0.0, -1.0] at point 0"),
    "nan_point": ({"pixel_coords": [[0, float("nan")], [3, 3], [1, 1]]}, "outside the image"),
    "no_points": ({"pixel_coords": [], "depth": []}, "no points"),
    "flat_points": ({"pixel_coords": [1, 2, 3]}, "pixel_coords is not an array of numbers"),
    "ragged_points": ({"pixel_coords": [[1, 2], [3], [4, 5]]}, "expected: numbers of shape N × 2"),
    "text_depth": ({"depth": ["1", "2", "3"]}, "depth is not an array of numbers"),
    "huge_depth": ({"depth": [10**400, 1, 1]}, "depth is not an array of numbers"),
    "null_intrinsics": ({"intrinsics": None}, "unknown intrinsics\n  found:    no focal length"),
    "depth_kind": ({"depth_kind": "disparity"}, "unknown depth_kind\n  found:    'disparity'\n  expected: z or ray"),
    "missing_image": ({"image": "rgb/b.png"}, "cannot read image 'rgb/b.png'"),
    "image_is_folder": ({"image": "rgb"}, "cannot read image 'rgb'"),
    "parent_path": ({"image": "rgb/../../a.png"}, "image path leaves the image folder"),
    "absolute_path": ({"image": "/etc/hostname"}, "image path leaves the image folder\n  found:    /etc/hostname"),
    "image_is_number": ({"image": 3}, "image path leaves the image folder\n  found:    3"),
}  # fmt: skip


@pytest.mark.parametrize("changes, expected", BAD_RECORDS.values(), ids=BAD_RECORDS.keys())
def test_a_bad_record_is_named_with_its_line(folder, changes, expected):
    bad = {name: value for name, value in (GOOD | changes).items() if value is not ...}
    opened = records.open_source(write(folder, GOOD, bad))
    text = message(opened.__getitem__, 1)
    assert text.startswith("train.jsonl:2: ")
    assert expected in text
    assert "fix:" in text


@pytest.mark.parametrize(
    "line, expected",
    [('{"image": "rgb/a.png", "intr', "line is not JSON"), ("[1, 2]", "line is not a JSON object\n  found:    list"),
     ("[" * 100_000, "line is not JSON")],
    ids=["cut", "list", "deep"],
)  # fmt: skip
def test_a_line_that_is_no_object_is_named(folder, line, expected):
    text = message(records.open_source(write(folder, GOOD, line)).__getitem__, 1)
    assert text.startswith(f"train.jsonl:2: {expected}")


def test_a_path_with_dots_in_a_name_is_no_escape(folder):
    (folder / "..a.png").write_bytes(encode(noise()))
    assert record_of(folder, image="rgb/.././..a.png").image == encode(noise())


def bad_image(folder: Path, content: bytes, **changes) -> str:
    (folder / "rgb" / "a.png").write_bytes(content)
    text = message(images.decode_image, record_of(folder, **changes))
    assert text.startswith("train.jsonl:1: ")
    return text


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_image(folder, kind):
    assert "cannot decode image" in bad_image(folder, encode(noise(), kind)[:-200])


def test_bytes_that_are_no_image(folder):
    assert "cannot decode image" in bad_image(folder, b"<html>404</html>")
    assert "0 bytes" in bad_image(folder, b"")


def test_16_bit_image_is_not_clipped_in_silence(folder):
    image = Image.fromarray(np.full((30, 40), 60_000, np.uint16))
    assert "over 8 bits a channel" in bad_image(folder, encode(image))


def test_declared_size_must_be_the_decoded_one(folder):
    text = bad_image(folder, encode(noise(41, 30)))
    assert "size is not the declared one\n  found:    (41, 30) decoded, (40, 30) declared" in text


def test_points_are_checked_against_the_decoded_image_if_no_size_is_declared(folder):
    text = bad_image(folder, encode(noise(20, 30)), intrinsics=GOOD["intrinsics"][:4])
    assert "point outside the image\n  found:    [39.0, 29.0] at point 1\n  expected: x < 20" in text


def with_png_size(png: bytes, width: int, height: int) -> bytes:
    """Returns the PNG with another size in its header: what an attacker sends, or a flipped bit."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 40_000])  # over our limit, Pillow's warning, Pillow's error
def test_image_that_would_fill_the_memory(folder, side):
    assert "image is too large" in bad_image(folder, with_png_size(encode(noise()), side, side))


def test_orientation_is_applied_and_grey_becomes_rgb(folder):
    grey_HW = np.arange(40 * 30, dtype=np.uint8).reshape(30, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    (folder / "rgb" / "a.png").write_bytes(encode(Image.fromarray(grey_HW), exif=exif))
    record = record_of(folder, intrinsics=[30, 30, 14.5, 19.5, 30, 40], pixel_coords=[[29, 39]], depth=[1])
    expected_HW = np.rot90(grey_HW, k=-1)
    np.testing.assert_array_equal(images.decode_image(record), np.repeat(expected_HW[..., None], 3, axis=2))


def test_missing_and_empty_sources_are_named(folder):
    assert f"no data at source.path '{folder}/none.jsonl'" in message(
        records.open_source, Source(f"{folder}/none.jsonl")
    )
    assert "no data at source.path ''\n  found:    empty" in message(records.open_source, Source())
    text = message(records.open_source, Source(path=str(folder / "rgb")))
    assert "found:    a folder without dataset_info.json" in text and "dataset_info.json in it" in text
    text = message(records.open_source, Source(path=str(folder / "rgb" / "a.png")))
    assert "found:    a file whose name does not end in .jsonl" in text
    assert "train.jsonl: no records" in message(records.open_source, write(folder, "", "  "))


def test_a_folder_too_high_names_what_is_below(folder):
    write(folder, GOOD)
    for name in ("b/1.0.0", "a/1.0.0", "c/deeper/1.0.0"):
        (folder / "sets" / name).mkdir(parents=True)
        (folder / "sets" / name / "dataset_info.json").touch()
    text = message(records.open_source, Source(path=str(folder)))
    assert f"found:    a folder; below it: {folder}/train.jsonl\n" in text
    text = message(records.open_source, Source(path=str(folder / "sets")))
    assert f"found:    a folder; below it: {folder}/sets/a/1.0.0, {folder}/sets/b/1.0.0\n" in text


@pytest.mark.parametrize(
    "field, fix",
    [
        ("data.sources.rooms", "fix:      set --config.data.sources.rooms.path=…"),
        ("eval.source", "fix:      set --config.eval.source.path=…"),
        ("--input", "fix:      set --input=…"),
    ],
)
def test_the_error_names_the_flag_that_gives_the_path(field, fix):
    text = message(records.open_source, Source(), None, field)
    assert text.endswith(fix)
    assert "gcsfs" in message(records.open_source, Source("gs://no_bucket_of_this_name/a.json"), None, field)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return synthetic.build(tmp_path_factory.mktemp("tfds"), train_scenes=6, val_scenes=1)


def test_tfds_slices_select(prepared):
    whole = records.open_source(Source(path=str(prepared), split="train"))
    part = records.open_source(Source(path=str(prepared), split="train[2:5]"))
    assert (len(whole), len(part)) == (6, 3)
    assert [record.image for record in part] == [whole[index].image for index in (2, 3, 4)]
    assert whole[5].record_id == "synthetic_depth/train:5"
    with pytest.raises(IndexError, match="record 6 of 6"):
        whole[6]


def test_tfds_threads_and_pickles_read_the_same(prepared):
    opened = records.open_source(Source(path=str(prepared)))
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda n: pickle.loads(pickle.dumps(opened))[n % 6].image, range(48)))
    assert images == [opened[n % 6].image for n in range(48)]


@pytest.mark.parametrize("split", ["trian", "train[:0]", "train[5:", ""])
def test_tfds_split_that_is_not_there(prepared, split):
    text = message(records.open_source, Source(path=str(prepared), split=split))
    assert f"cannot read split {split!r}" in text and "['train', 'validation']" in text


def test_tfds_lost_shard_is_named(tmp_path):
    folder = synthetic.build(tmp_path, train_scenes=1, val_scenes=1)
    next(folder.glob("*-train.array_record-*")).unlink()
    text = message(records.open_source(Source(path=str(folder))).__getitem__, 0)
    assert text.startswith("synthetic_depth/train:0: cannot read record")


def test_tfds_files_without_random_access_are_named(tmp_path):
    folder = synthetic.build(tmp_path, train_scenes=1, val_scenes=1)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    text = message(records.open_source, Source(path=str(folder)))
    assert "no random access" in text and 'file_format="array_record"' in text


def test_tfds_label_names_its_depth_kind(tmp_path):
    folder = synthetic.build(tmp_path, train_scenes=1, val_scenes=1)
    source = Source(path=str(folder))
    (folder / "depth_kind.labels.txt").write_text("ray\nz\n")
    assert records.open_source(source)[0].depth_kind == "ray"
    (folder / "depth_kind.labels.txt").write_text("disparity\nz\n")
    text = message(records.open_source(source).__getitem__, 0)
    assert text.startswith("synthetic_depth/train:0: unknown depth_kind\n  found:    'disparity'")


@pytest.mark.skipif(not IBIMS.is_file(), reason="no iBims-1 subset in ../shared/data/ibims1")
def test_ibims_reads_whole():
    opened = records.open_source(Source(path=str(IBIMS)))
    assert len(opened) == 20
    for record in opened:
        assert images.decode_image(record).shape == (480, 640, 3)
        assert (len(record.depth_m), record.size, record.dataset) == (100, (640, 480), "ibims1_subset")
    depth_m = np.concatenate([record.depth_m for record in opened])
    assert 0.63 <= depth_m.min() < depth_m.max() <= 22.35


TURN = [[0.0, -1.0, 0.0, 2.0], [1.0, 0.0, 0.0, -3.0], [0.0, 0.0, 1.0, 0.5]]


@pytest.mark.parametrize("pose", [TURN, [*TURN, [0, 0, 0, 1]]], ids=["3x4", "4x4"])
def test_pose_and_scene_are_read(folder, pose):
    record = record_of(folder, pose=pose, scene="log 7")
    assert record.pose.tolist() == [*TURN, [0, 0, 0, 1]] and record.pose.dtype == np.float64
    assert record.scene == "log 7"


def test_pose_and_scene_may_be_left_out_or_null(folder):
    for record in (record_of(folder), record_of(folder, pose=None, scene=None)):
        assert record.pose is None and record.scene == ""


BAD_POSES = {
    "flat": ([1.0] * 16, "pose is not an array of numbers"),
    "two_rows": (TURN[:2], "pose is not a matrix of 3 or 4 rows"),
    "nan": ([[float("nan"), -1, 0, 2], *TURN[1:]], "pose is not a rotation and a shift"),
    "infinite_shift": ([[0, -1, 0, float("inf")], *TURN[1:]], "pose is not a rotation and a shift"),
    "scaled": ([[0, -1.01, 0, 2], *TURN[1:]], "pose is not a rotation and a shift"),
    "mirrored": ([[0, 1, 0, 2], *TURN[1:]], "pose is not a rotation and a shift"),
    "last_row": ([*TURN, [0, 0, 1, 1]], "pose is not a rotation and a shift"),
}


@pytest.mark.parametrize("pose, expected", BAD_POSES.values(), ids=BAD_POSES.keys())
def test_a_bad_pose_is_named(folder, pose, expected):
    text = message(lambda: record_of(folder, pose=pose))
    assert text.startswith(f"train.jsonl:1: {expected}")


def test_a_rotation_rounded_in_a_file_is_accepted(folder):
    assert record_of(folder, pose=[[0.0004, -1, 0, 2], *TURN[1:]]).pose is not None


def test_a_scene_that_is_no_text_is_named(folder):
    assert "scene is not a text" in message(lambda: record_of(folder, scene=[7]))


UNKNOWN = {"missing": ..., "null": None, "zeros": [0, 0, 0, 0], "zeros_with_size": [0, 0, 0, 0, 40, 30]}


@pytest.mark.parametrize("intrinsics", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_intrinsics_need_a_field_of_view(folder, intrinsics):
    fields = {name: value for name, value in (GOOD | {"intrinsics": intrinsics}).items() if value is not ...}
    source = write(folder, fields)
    text = message(records.open_source(source).__getitem__, 0)
    assert text.startswith("train.jsonl:1: unknown intrinsics") and "set fov_degrees of the source" in text
    opened = records.open_source(Source(path=source.path, fov_degrees=90))
    np.testing.assert_allclose(opened[0].intrinsics, [20, 20, 19.5, 14.5])  # tan 45° = 1
    assert opened.index["fx"][0] == pytest.approx(20) and opened.index["width"][0] == 40


def test_a_field_of_view_repairs_no_wrong_intrinsics(folder):
    for bad in ([-30, 31, 19.5, 14.5], [float("nan"), 31, 19.5, 14.5], [0, 31, 19.5, 14.5]):
        source = write(folder, GOOD | {"intrinsics": bad})
        opened = records.open_source(Source(path=source.path, fov_degrees=60))
        assert "bad intrinsics" in message(opened.__getitem__, 0)
        assert np.isnan(opened.index["fx"][0])


def test_known_intrinsics_win_over_the_field_of_view(folder):
    source = write(folder, GOOD)
    assert records.open_source(Source(path=source.path, fov_degrees=60))[0].intrinsics.tolist() == [30, 31, 19.5, 14.5]


class Bucket(MemoryFileSystem):
    """A store behind gs:// in memory."""

    protocol = ("gcs", "gs")
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("gs://", "memory://"))


@pytest.fixture
def bucket(folder, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))  # where copies of an index go
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    Bucket.store.clear()
    store = Bucket()
    store.pipe("gs://b/data/rgb/a.png", (folder / "rgb" / "a.png").read_bytes())
    return store


def test_a_bucket_reads_as_a_folder_does(folder, bucket):
    local = write(folder, GOOD, GOOD | {"dataset": "second"})
    bucket.pipe("gs://b/data/train.jsonl", Path(local.path).read_bytes())
    opened = records.open_source(Source(path="gs://b/data/train.jsonl"))
    for near, far in zip(records.open_source(local), opened, strict=True):
        assert (near.record_id, near.image, near.dataset) == (far.record_id, far.image, far.dataset)
    assert bucket.exists("gs://b/data/train.jsonl.index")
    again = records.open_source(Source(path="gs://b/data/train.jsonl"))
    np.testing.assert_array_equal(again.index, opened.index)


def test_what_a_bucket_lacks_is_named(folder, bucket):
    assert "no data at source.path 'gs://b/none.jsonl'" in message(
        records.open_source, Source(path="gs://b/none.jsonl")
    )
    bucket.pipe("gs://b/data/train.jsonl", json.dumps(GOOD | {"image": "rgb/b.png"}).encode())
    opened = records.open_source(Source(path="gs://b/data/train.jsonl"))
    assert message(opened.__getitem__, 0).startswith("train.jsonl:1: cannot read image 'rgb/b.png'")
    bucket.rm("gs://b/data/train.jsonl")
    assert message(opened.__getitem__, 0).startswith("train.jsonl:1: cannot read line")


WRITTEN = {"index-train.index", "index-validation.index"}  # by the writer of the data set


def test_tfds_index_tells_each_camera_and_is_cached(tmp_path):
    folder = synthetic.build(tmp_path, train_scenes=5, val_scenes=1)
    opened = records.open_source(Source(path=str(folder), split="train[1:4]"))
    assert isinstance(opened.index, np.memmap) and Path(opened.index_file).is_file()
    assert {file.name for file in folder.glob("*.index")} - {Path(opened.index_file).name} == WRITTEN
    again = pickle.loads(pickle.dumps(opened))
    for row, row_again, record in zip(opened.index, again.index, opened, strict=True):
        assert [row["fx"], row["fy"]] == record.intrinsics[:2].tolist()
        assert (row["width"], row["height"]) == record.size
        assert row == row_again
    whole = records.open_source(Source(path=str(folder), split="train"))
    assert len(whole.index) == 5 and (whole.index["fx"][1:4] == opened.index["fx"]).all()


def test_tfds_camera_that_is_a_matrix_is_named(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "intrinsics": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
        }
    )
    file = tmp_path / "matrix-train.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    example = {"image": encode(noise()), "intrinsics": np.zeros((4, 4), np.float32)}
    writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    layout = tfds.core.ShardedFileTemplate(data_dir=tmp_path, template=template)
    split = tfds.core.SplitInfo(name="train", shard_lengths=[1], num_bytes=1, filename_template=layout)
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path, features=features, split_infos=[split], version="1.0.0", filename_template=template,
        check_data=False,
    )  # fmt: skip
    opened = records.open_source(Source(str(tmp_path)))
    assert np.isnan(opened.index["fx"][0]) and opened.index["width"][0] == 40
    assert "intrinsics" in message(opened.__getitem__, 0).splitlines()[0]
