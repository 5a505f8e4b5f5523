import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from depthlm_jax import __main__ as program
from depthlm_jax.config import Source
from depthlm_jax.data import images, records, synthetic, writer
from depthlm_jax.errors import InputError

POSE = [[0.0, -1.0, 0.0, 2.0], [1.0, 0.0, 0.0, -3.0], [0.0, 0.0, 1.0, 0.5], [0.0, 0.0, 0.0, 1.0]]


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Examples that tell their index; picklable, so that processes can make them."""

    bad: tuple[int, ...] = ()

    def __call__(self, index: int) -> dict:
        if index in self.bad:
            raise InputError(f"line {index}", found="nothing", expected="something", fix="write it")
        return {
            "image": png(index % 256), "intrinsics": np.array([5, 6, 3.5, 2.5, 8, 6], np.float32),
            "pixel_coords": np.zeros((1 + index % 3, 2), np.float32),
            "depth": np.full(1 + index % 3, index + 1, np.float32), "depth_kind": "ray", "dataset": f"d{index}",
        }  # fmt: skip


class Posed(Numbered):
    """Examples of one scene."""

    def __call__(self, index: int) -> dict:
        return super().__call__(index) | {"pose": np.array(POSE, np.float32), "scene": "höll"}


def depths(folder: Path, split: str = "train") -> list[float]:
    return [record.depth_m[0] for record in records.open_source(Source(str(folder), split))]


@pytest.mark.parametrize("shards, workers, files", [(1, 1, 1), (4, 1, 4), (3, 2, 3), (50, 1, 11)])
def test_record_i_is_example_i(tmp_path, shards, workers, files):
    splits = {"train": (11, Numbered()), "test": (1, Numbered())}
    folder = writer.write(tmp_path / "1.0.0", "counted", splits, shards, workers)
    assert folder == tmp_path / "1.0.0"
    assert len(list(folder.glob("counted-train.array_record-*"))) == files
    assert depths(folder) == list(range(1, 12)) and depths(folder, "test") == [1]
    record = records.open_source(Source(str(folder)))[7]
    assert (record.image, record.depth_kind, record.dataset) == (png(7), "ray", "d7")
    assert (record.pose, record.scene, len(record.depth_m)) == (None, "", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["1.0.0"]
    assert not [path for path in folder.iterdir() if "unfinished" in path.name or path.name == "progress"]


@pytest.mark.parametrize("shards, workers", [(4, 1), (3, 2)])
def test_the_first_opening_finds_the_index_that_would_have_been_built(tmp_path, shards, workers):
    splits = {"train": (11, Numbered(bad=(0, 7))), "test": (2, Posed())}
    folder = writer.write(tmp_path / "1.0.0", "counted", splits, shards, workers, max_bad_records=2)
    calls = []
    for split in splits:
        source = Source(str(folder), split)
        found = records.open_source(source, lambda *_: calls.append(1))
        rows = np.array(found.index)
        assert calls == [] and len(rows) == len(found)
        Path(found.index_file).unlink()
        assert records.open_source(source, lambda *_: calls.append(1)).index.tolist() == rows.tolist()
        assert calls.pop()
    assert rows["scene"].all() and (rows["width"] == 8).all() and (rows["fy"] == 6).all()


def test_tfds_reads_it_by_name_and_decodes(tmp_path):
    writer.write(tmp_path / "counted" / "1.0.0", "counted", {"train": (3, Numbered())})
    rows = tfds.data_source("counted", data_dir=tmp_path, split="train")
    assert [int(row["depth"][0]) for row in rows] == [1, 2, 3]
    assert rows[2]["image"].shape == (6, 8, 3) and rows[2]["image"][0, 0].tolist() == [2, 2, 2]
    assert not rows[0]["pose"].any()


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_every_record(tmp_path, workers):
    calls = []
    splits = {"train": (9, Numbered())}
    writer.write(tmp_path / "1.0.0", "counted", splits, 3, workers, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (9, 9) and calls == sorted(calls)


def test_a_complete_data_set_is_kept_and_an_interrupted_one_is_redone(tmp_path):
    folder = writer.write(tmp_path / "1.0.0", "counted", {"train": (3, Numbered())}, 2)
    writer.write(folder, "counted", {"train": (5, Numbered())})
    assert depths(folder) == [1, 2, 3]
    (folder / "dataset_info.json").unlink()
    writer.write(folder, "counted", {"train": (5, Numbered())})
    assert depths(folder) == [1, 2, 3, 4, 5]
    assert len(list(folder.glob("*.array_record-*"))) == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "1.0.0").mkdir()
    (tmp_path / "1.0.0" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not a folder for data set 'counted'") as caught:
        writer.write(tmp_path / "1.0.0", "counted", {"train": (3, Numbered())})
    assert "thesis.tex" in str(caught.value) and (tmp_path / "1.0.0" / "thesis.tex").is_file()


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_bad_records_stop_and_leave_nothing(tmp_path, workers):
    with pytest.raises(InputError, match="counted: 1 bad records\n  found:    line 4\n") as caught:
        writer.write(tmp_path / "1.0.0", "counted", {"train": (9, Numbered(bad=(4,)))}, 3, workers)
    assert "--max_bad_records" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shards, workers", [(1, 1), (9, 1), (4, 2)])
def test_bad_records_up_to_the_limit_are_left_out_and_told(tmp_path, shards, workers):
    told, examples = [], Numbered(bad=(0, 4, 5))
    folder = writer.write(
        tmp_path / "1.0.0", "counted", {"train": (9, examples)}, shards, workers, None, 3, told.append
    )
    assert depths(folder) == [2, 3, 4, 7, 8, 9]
    assert sorted(text.splitlines()[0] for text in told) == ["line 0", "line 4", "line 5"]
    assert depths(folder, "train[4:]") == [8, 9]


def test_the_limit_holds_over_all_shards(tmp_path):
    with pytest.raises(InputError, match="3 bad records"):
        writer.write(tmp_path / "1.0.0", "counted", {"train": (9, Numbered(bad=(0, 4, 8)))}, 3, max_bad_records=2)


def test_a_split_without_any_record_is_named(tmp_path):
    with pytest.raises(InputError, match="split 'train': no records"):
        writer.write(tmp_path / "1.0.0", "counted", {"train": (2, Numbered(bad=(0, 1)))}, max_bad_records=9)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def jsonl(tmp_path):
    """Three records: longer focal length than 100 px on both axes, on one axis, shorter on both."""
    (tmp_path / "rgb").mkdir()
    cameras = [[220.0, 230.0, 101.3, 70.2, 200, 150], [150.0, 90.0, 60.0, 40.0], [50.0, 51.0, 31.5, 23.5, 64, 48]]
    lines = []
    for number, (camera, kind) in enumerate(zip(cameras, ("jpg", "png", "png"), strict=True)):
        width, height = (camera[4:] or [121, 81])[:2]
        picture(int(width), int(height), number).save(tmp_path / "rgb" / f"{number}.{kind}")
        points = [[0, 0], [width - 1, height - 1], [width - 0.5001, -0.5], [17, 23.25]]
        lines.append({"image": f"rgb/{number}.{kind}", "intrinsics": camera, "pixel_coords": points,
                      "depth": [1.5, 2.25, 3.1, 80.7], "pose": POSE, "scene": "hall"})  # fmt: skip
    lines[2] |= {"depth_kind": "ray", "dataset": "other"}
    del lines[2]["pose"]
    path = tmp_path / "My set.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def convert(jsonl: Path, *flags: str) -> Path:
    output = jsonl.parent / "out"
    arguments = ["curate", "--dataset=jsonl", f"--input={jsonl}", f"--output={output}", "--workers=1", *flags]
    assert program.main(arguments) == 0
    return output / "my_set" / "1.0.0"


def test_conversion_keeps_every_record(jsonl):
    before = records.open_source(Source(str(jsonl)))
    after = records.open_source(Source(str(convert(jsonl, "--shards=2"))))
    assert len(before) == len(after) == 3
    for old, new in zip(before, after, strict=True):
        assert (old.image, old.depth_kind, old.dataset, old.scene) == (
            new.image,
            new.depth_kind,
            new.dataset,
            new.scene,
        )
        np.testing.assert_allclose(new.pixel_coords, old.pixel_coords, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(new.intrinsics, old.intrinsics, rtol=1e-6)
        np.testing.assert_array_equal(new.depth_m, old.depth_m.astype(np.float32))
        assert (old.pose is None) == (new.pose is None) and (old.pose is None or (old.pose == new.pose).all())
        np.testing.assert_array_equal(images.decode_image(new), images.decode_image(old))
    for name in ("fx", "fy", "width", "height", "scene"):
        np.testing.assert_allclose(after.index[name], before.index[name], rtol=1e-6)


def rays(record: records.DepthRecord) -> np.ndarray:
    """Returns x/z and y/z of each point."""
    return (record.pixel_coords - record.intrinsics[2:]) / record.intrinsics[:2]


def test_conversion_to_a_focal_length_keeps_rays_labels_and_what_the_image_shows(jsonl):
    before = records.open_source(Source(str(jsonl)))
    after = records.open_source(Source(str(convert(jsonl, "--focal_px=100"))))
    assert [record.size for record in after] == [(91, 65), (81, 81), (64, 48)]  # 200 / 2.2, 150 / 2.3; 121 / 1.5
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(rays(new), rays(old), atol=1e-3)
        np.testing.assert_array_equal(new.depth_m, old.depth_m.astype(np.float32))
        assert (new.intrinsics[:2] < 100 * (1 + 1 / 81)).all()
        shown, original = images.decode_image(new), images.decode_image(old)
        expected = Image.fromarray(original).resize(new.size, Image.Resampling.BICUBIC)
        assert np.abs(shown.astype(int) - np.asarray(expected, int)).mean() < 3
    kinds = [Image.open(io.BytesIO(record.image)).format for record in after]
    assert kinds == ["JPEG", "PNG", "PNG"]
    assert after[2].image == before[2].image  # never enlarged, never encoded again without need


def test_a_resized_photograph_is_stored_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(80, 40).save(tmp_path / "a.jpg", exif=exif)
    line = {"image": "a.jpg", "intrinsics": [200, 200, 19.5, 39.5], "pixel_coords": [[39, 79]], "depth": [2]}
    (tmp_path / "my_set.jsonl").write_text(json.dumps(line))
    (record,) = records.open_source(Source(str(convert(tmp_path / "my_set.jsonl", "--focal_px=100"))))
    assert record.size == (20, 40) and images.decode_image(record).shape == (40, 20, 3)


def test_conversion_stops_at_a_bad_line_or_leaves_it_out(jsonl, capsys):
    lines = jsonl.read_text().splitlines()
    bad = json.dumps(json.loads(lines[0]) | {"depth": [1, 2, 3, -4]})
    jsonl.write_text("\n".join([*lines, bad, "{"]))
    arguments = ["curate", "--dataset=jsonl", f"--input={jsonl}", f"--output={jsonl.parent}/out", "--workers=1"]
    assert program.main(arguments) == 1
    assert "My set.jsonl:4: depth is not a positive finite number" in capsys.readouterr().err
    assert len(records.open_source(Source(str(convert(jsonl, "--max_bad_records=2"))))) == 3
    assert "2 of 5 records left out" in capsys.readouterr().out


def test_the_same_conversion_is_kept_with_what_it_left_out(jsonl, capsys):
    jsonl.write_text(jsonl.read_text() + "{\n")
    convert(jsonl, "--max_bad_records=1", "--json")
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    convert(jsonl, "--workers=2", "--json")
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == first and first["left_out"] == 1
    assert any(line.startswith("kept: ") for line in lines) and "1 of 4 records left out" in lines


def made_of(jsonl: Path) -> Path:
    return jsonl.parent / "out" / "my_set" / "1.0.0" / "made_of.json"


CHANGES = {
    "option": (lambda file: None, "--focal_px=100", "was made with focal_px=0"),
    "input": (lambda file: file.write_text(file.read_text() + "\n"), "--shards=0", "was made with input_content={"),
    "unknown": (lambda file: made_of(file).unlink(), "--shards=0", "nobody knows what it was made of"),
    "foreign": (lambda file: made_of(file).write_text("{}"), "--shards=0", "was made with input=None"),
    "damaged": (lambda file: made_of(file).write_text("{"), "--shards=0", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("change, flag, text", CHANGES.values(), ids=CHANGES.keys())
def test_a_data_set_made_otherwise_is_not_taken_for_this_one(jsonl, capsys, change, flag, text):
    folder = convert(jsonl)
    change(jsonl)
    arguments = ["curate", "--dataset=jsonl", f"--input={jsonl}", f"--output={jsonl.parent}/out", "--workers=1", flag]
    assert program.main(arguments) == 1
    error = capsys.readouterr().err
    assert str(folder) in error and text in error and "give another --output" in error
    assert len(records.open_source(Source(str(folder)))) == 3


def test_a_wrong_input_names_the_flag(tmp_path, capsys):
    arguments = ["curate", "--dataset=jsonl", f"--input={tmp_path}/none.jsonl", f"--output={tmp_path}/out"]
    assert program.main(arguments) == 1
    assert "fix:      set --input=…" in capsys.readouterr().err


def test_a_pose_that_float32_would_blur_is_named(jsonl):
    line = json.loads(jsonl.read_text().splitlines()[0])
    far = [[*row[:3], row[3] + 5_000_000.01] for row in POSE[:3]]
    jsonl.write_text(json.dumps(line | {"pose": far}))
    (record,) = records.open_source(Source(str(jsonl)))
    with pytest.raises(InputError, match="My set.jsonl:1: pose is too far from its world's origin"):
        writer.example(record, 0)


def test_numbers_that_float32_loses_are_named(jsonl):
    line = json.loads(jsonl.read_text().splitlines()[0])
    jsonl.write_text(json.dumps(line | {"depth": [1, 1e-60, 1, 1]}))
    (record,) = records.open_source(Source(str(jsonl)))
    with pytest.raises(InputError, match="depth is not a positive finite number"):
        writer.example(record, 0)


def test_synthetic_scenes_come_in_order(tmp_path):
    folder = synthetic.build(tmp_path, 3, 1)
    for number, record in enumerate(records.open_source(Source(str(folder)))):
        scene = synthetic.render(synthetic.scene_seed(0, number))
        np.testing.assert_array_equal(images.decode_image(record), scene.image_HW3)
