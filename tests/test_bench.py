"""The measurements: both commands really run, and what they compare is the same work."""

import dataclasses
import json
import os
import shutil
import sys
import tempfile

import numpy as np
import pytest
import safetensors.numpy
import transformers
from PIL import Image

from configs import qwen2_5_vl_3b
from depthlm_jax import __main__ as program
from depthlm_jax import config as config_module
from depthlm_jax.bench import convert, data, decode, index, peer, train
from depthlm_jax.data import camera
from depthlm_jax.data.index import ROW
from depthlm_jax.errors import InputError

GREY_LEVELS = 1.0  # mean difference of the two paths' pictures


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A .jsonl file of three smooth 640×480 pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number in range(3):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        points = [[100 + 40 * k, 200] for k in range(10)]
        lines.append({"image": f"{number}.png", "intrinsics": [560, 560, 319.5, 239.5, 640, 480],
                      "pixel_coords": points, "depth": [2.0] * 10})  # fmt: skip
    file = folder / "pictures.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    status = program.main(["bench", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_bench_data_runs(capsys, pictures, monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_IMAGES", 2)
    cores = os.sched_getaffinity(0)
    status, out, err = call(capsys, "data", f"--images={pictures}", "--repeats=1", "--json")
    assert status == 0, err
    assert os.sched_getaffinity(0) == cores
    result = json.loads(out.splitlines()[-1])
    assert {name: found["images"] for name, found in result["sets"].items()} == {"pictures.jsonl": 3, "synthetic": 2}
    assert result["ratio"] == min(found["ratio"] for found in result["sets"].values())
    assert data.PEER in out and result["peer"] == data.PEER
    for found in result["sets"].values():
        assert sum(found["parts_ms"].values()) == pytest.approx(found["ours_ms"])
        assert found["ours_images_s"] * found["ours_ms"] == pytest.approx(1000)
        assert found["ratio"] == pytest.approx(found["ours_images_s"] / found["plain_images_s"])
        assert 0 < found["parts_ms"]["decoding"] < 1000


@pytest.mark.parametrize("source", ["pictures", "synthetic"])
def test_both_paths_give_the_same_sample(source, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_IMAGES", 2)
    held = data.real(str(pictures)) if source == "pictures" else data.synthetic()
    paths = data.paths_of(held, tmp_path)
    slots = data.planned(paths.maker, held)
    assert sorted(slot.record for slot in slots) == list(range(len(held)))
    for slot in slots:
        example, sample = paths.maker(slot)
        patches, tokens = paths.lanes(slot)["plain"]()
        np.testing.assert_array_equal(tokens["input_ids"], sample.tokens_T)
        same = paths.image_processor(images=[Image.fromarray(example.images[0])], return_tensors="np")
        np.testing.assert_array_equal(patches["image_grid_thw"], same["image_grid_thw"])
        if source == "pictures":
            deviation = 255 * np.mean(paths.image_processor.image_std)
            assert deviation * np.abs(patches["pixel_values"] - same["pixel_values"]).mean() < GREY_LEVELS


def test_sizes_are_those_of_the_3b_recipe(tmp_path):
    recipe = config_module.parse(qwen2_5_vl_3b.get_config())
    paths = data.paths_of(data.Held([], np.zeros(0, ROW)), tmp_path)
    assert paths.maker.config.data.geometry == recipe.data.geometry
    ours, published = paths.maker.processor.config.vision, recipe.model.hf_config["vision_config"]
    assert ours.patch_size == published["patch_size"]
    assert ours.spatial_merge_size == published["spatial_merge_size"]
    assert ours.window_size == published["window_size"]


def test_synthetic_images_are_like_photographs(monkeypatch):
    monkeypatch.setattr(data, "SYNTHETIC_IMAGES", 1)
    held = data.synthetic()
    assert 1.0 < 8 * len(held[0].image) / (1920 * 1280) < 3.0  # bits a pixel
    source = camera.Camera(*held[0].intrinsics.tolist(), *held[0].size)
    assert camera.plan_view(source, config_module.Geometry(), 28, None).reduction == 2


def test_images_that_give_no_sample_are_named(pictures, tmp_path):
    held = data.real(str(pictures))
    cut = [dataclasses.replace(record, image=record.image[:2000]) for record in held.records]
    paths = data.paths_of(data.Held(cut, held.index), tmp_path)
    with pytest.raises(InputError, match="bench data: no sample(.|\n)*pictures.jsonl:.*cannot decode"):
        data.planned(paths.maker, paths.maker.sources[data.SOURCE])


def test_bench_index_runs(capsys):
    status, out, err = call(capsys, "index", "--records=2000", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["records"] == 2000
    assert result["bytes_per_record"] == ROW.itemsize
    assert result["ratio"] == pytest.approx(result["peer_s"] / result["open_s"])
    assert result["peer"] in index.PEERS.values() and result["peer"] in out
    assert min(result[f"{way}_s"] for way in ("build", "open", "peer")) > 0


def test_memory_is_the_childs_own(tmp_path):
    """Not hidden below the peak of this process, which is larger than the child's."""
    file = tmp_path / "records.jsonl"
    index.write(file, 20_000)
    read = index.in_a_process("json", file)
    assert read["records"] == 20_000
    assert read["mib"] > file.stat().st_size / 2**20  # dictionaries are larger than their text


def test_a_measurement_that_fails_is_named(tmp_path):
    with pytest.raises(InputError, match="bench index: open ended early(.|\n)*no.jsonl(.|\n)*fewer --records"):
        index.in_a_process("open", tmp_path / "no.jsonl")


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """A folder of random weights as bench convert writes it, with two small layers."""
    folder = tmp_path_factory.mktemp("small") / "hf"
    vision = convert.HF_CONFIG["vision_config"] | {
        "depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    small = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 80, "num_hidden_layers": 2}
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "HF_CONFIG", convert.HF_CONFIG | small | {"rope_scaling": rope, "vision_config": vision})
        patch.setattr(convert, "VOCABULARY", 600)
        convert.write_random(folder)
    return folder


def test_bench_convert_runs(capsys, small_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "PASSES", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    status, out, err = call(capsys, "convert", f"--hf_dir={small_folder}", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    tensors = safetensors.numpy.load_file(small_folder / "model.safetensors")
    assert (result["tensors"], result["identical"]) == (len(tensors), True)
    assert result["bytes"] == sum(value.nbytes for value in tensors.values())
    assert result["ratio"] == pytest.approx(result["cp_s"] / result["export_s"])
    assert result["peer"] == "cp" and "× the speed of cp" in out
    for way in ("cp", "export", "import"):
        assert result[f"{way}_gb_s"] * result[f"{way}_s"] == pytest.approx(result["bytes"] / 1e9)
    if sys.platform == "linux":
        assert result["cp_peak_gb"] < 0.05 < result["export_peak_gb"] < 2
    assert list(tmp_path.iterdir()) == []


def test_random_weights_are_finite_and_the_folder_is_whole(small_folder):
    tensors = safetensors.numpy.load_file(small_folder / "model.safetensors")
    assert {value.dtype.name for value in tensors.values()} == {"bfloat16"}
    assert all(np.abs(value.astype(np.float32)).max() < 2 for value in tensors.values())
    assert len({value.tobytes() for value in tensors.values()}) == len(tensors)
    values = json.loads((small_folder / "config.json").read_text())
    assert values["vocab_size"] == 600 == len(tensors["model.embed_tokens.weight"])
    assert transformers.AutoTokenizer.from_pretrained(small_folder)("How far?")["input_ids"]


def test_converted_sizes_are_those_of_the_3b_recipe():
    published = config_module.parse(qwen2_5_vl_3b.get_config()).model.hf_config
    assert {name: published[name] for name in convert.HF_CONFIG} == convert.HF_CONFIG
    assert published["vocab_size"] == convert.VOCABULARY


@pytest.mark.parametrize("change", ["a bit", "a name", "a type", "a shape"])
def test_a_difference_is_seen(small_folder, tmp_path, change):
    other = shutil.copytree(small_folder, tmp_path / "other")
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    value = tensors.pop(name)
    changed = {
        "a bit": (value.view(np.uint16) ^ (np.indices(value.shape).sum(0) == 0)).astype(np.uint16).view(value.dtype),
        "a name": value, "a type": value.view(np.float16), "a shape": value.reshape(-1),
    }  # fmt: skip
    tensors[f"{name}s" if change == "a name" else name] = changed[change]
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    with pytest.raises(InputError, match=f"not the weights of(.|\n)*differ: .*{name}"):
        convert.compare(small_folder, other)
    convert.compare(small_folder, small_folder)


def test_a_small_disk_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match="the disk is too small(.|\n)*3.0 GB free(.|\n)*16.1 GB(.|\n)*TMPDIR"):
        convert.measure(None)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_is_named(small_folder, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="bench convert: export(.|\n)*exit status 1(.|\n)*is not empty"):
        convert.in_a_process("export", small_folder, tmp_path / "own")


@pytest.fixture
def tiny_bench(monkeypatch):
    small = train.TINY | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                          "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = train.TINY["vision_config"] | {"depth": 2, "hidden_size": 32, "intermediate_size": 48,
                                            "out_hidden_size": 64, "fullatt_block_indexes": [1]}  # fmt: skip
    monkeypatch.setattr(train, "TINY", small | {"vision_config": vision})
    monkeypatch.setattr(train, "SHAPES", {"DepthLM": 900, "proportion": 700})
    monkeypatch.setattr(train, "CELLS", (3, 6))
    monkeypatch.setattr(decode, "CELLS", (5, 4))


def test_bench_train_runs_and_both_compute_the_same_loss(capsys, tiny_bench):
    status, out, err = call(capsys, "train", "--samples=3", "--repeats=2", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert list(result["shapes"]) == ["DepthLM", "proportion"] and result["peer"] == peer.NAME in out
    assert result["ratio"] == result["shapes"]["DepthLM"]["ratio"]
    for found in result["shapes"].values():
        assert found["ratio"] == pytest.approx(found["ours"]["samples_s"] / found["peer"]["samples_s"])
        assert len(found["ours"]["seconds"]) == len(found["peer"]["seconds"]) == 2
        assert found["filled_tokens"] == 1 > found["peer_filled_tokens"] > 0.3
        assert 0 < found["ours"]["mfu"] < 1 and 0 < found["useful_tflop"] < 1
        assert found["compile_seconds"] > max(found["ours"]["seconds"])
        assert 0 <= found["data_wait"] < 1 and found["make_seconds"] > 0


def test_another_loss_than_the_peers_is_an_error():
    train.check_same_loss({"ours": {"loss": 2.0}, "peer": {"loss": 2.0001}}, "float32")
    with pytest.raises(InputError, match="the peer computes something else(.|\n)*2.000000 and 2.010000"):
        train.check_same_loss({"ours": {"loss": 2.0}, "peer": {"loss": 2.01}}, "float32")


@pytest.mark.slow
def test_bench_save_measures_steps_with_and_without(capsys, tiny_bench):
    status, out, err = call(capsys, "save", "--repeats=1", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["ratio"] == pytest.approx(result["plain_seconds_a_step"] / result["save_seconds_a_step"])
    assert result["checkpoint_gb"] > 1e-4 and "a save every ten steps" in out


def test_bench_decode_runs_and_both_give_the_same_tokens(capsys, tiny_bench):
    status, out, err = call(capsys, "decode", "--questions=3", "--repeats=1", "--json")
    assert status == 0, err
    result = json.loads(out.splitlines()[-1])
    assert result["questions"] == 3 and "the same 33 tokens from both" in out
    assert result["ratio"] == pytest.approx(result["ours_answers_s"] / result["peer_answers_s"])


@pytest.mark.parametrize(
    "arguments, status, text",
    [
        ([], 2, "bench what? one of: convert, data, decode, index, save, train"),
        (["dta"], 2, "should be one of <convert|data|decode|index|save|train>"),
        (["data", "index"], 2, "what is 'index'?"),
        (["data", "--repeats=0"], 2, "repeats"),
        (["data", "--images=no/such.jsonl"], 1, "no/such.jsonl"),
        (["convert", "--hf_dir=no/such"], 1, "no/such/config.json: cannot be read"),
    ],
)
def test_wrong_usage_says_what_is_wrong(capsys, arguments, status, text):
    found, _, err = call(capsys, *arguments)
    assert found == status
    assert text in err


@pytest.mark.parametrize("arguments", [["--help"], ["data", "--help"]])
def test_help(capsys, arguments):
    status, out, _ = call(capsys, *arguments)
    assert status == 0
    assert "--images" in out and "--records" in out and "--hf_dir" in out
