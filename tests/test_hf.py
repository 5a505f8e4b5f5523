"""Weights in and out as streams: a slice is the slice, no more is read or held than needed, files are safetensors."""

import json
import subprocess
import sys
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import tiny
import torch

from depthlm_jax import hf, sharding, tree
from depthlm_jax import run as runs
from depthlm_jax.config import Mesh
from depthlm_jax.errors import InputError
from depthlm_jax.hf import FUSED, FUSED_BIAS, LINEAR, SAME, Rule, patch_layout
from depthlm_jax.models import registry
from depthlm_jax.release import read_jsons

DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
RULES = [
    Rule("same", "same.weight", SAME, "VD"),
    Rule("scale", "scale.weight", SAME, "D"),
    Rule("linear", "linear.weight", LINEAR, "DF"),
    Rule("fused", "fused.weight", FUSED, "D3H"),
    Rule("patch", "patch.weight", patch_layout(3, 4), "2CD"),
    Rule("layers/scale", "layers.{}.scale", SAME, "LD"),
    Rule("layers/kernel", "layers.{}.weight", LINEAR, "LDH"),
    Rule("layers/qkv", "layers.{}.qkv.weight", FUSED, "LD3H"),
    Rule("layers/qkv_bias", "layers.{}.qkv.bias", FUSED_BIAS, "L3H"),
]
SHAPES = {
    "same": (24, 8), "scale": (8,), "linear": (8, 12), "fused": (8, 3, 4), "patch": (2, 48, 8),
    "layers/scale": (5, 8), "layers/kernel": (5, 8, 4), "layers/qkv": (5, 8, 3, 4), "layers/qkv_bias": (5, 3, 4),
}  # fmt: skip


def random_tensors(dtype: np.dtype, seed: int = 0) -> dict[str, np.ndarray]:
    """Random bits without NaN, which no comparison of values would see as equal."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in hf.tensor_shapes(RULES, SHAPES).items()}


def whole_parameters(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters as the layouts define them, all at once."""
    parameters = {}
    for rule in RULES:
        parts = [
            rule.layout.read(tensors[name], rule.part(SHAPES[rule.path])) for name in rule.tensors(SHAPES[rule.path])
        ]
        parameters[rule.path] = np.stack(parts) if rule.stacked else parts[0]
    return parameters


def assert_same_bits(found: np.ndarray, expected: np.ndarray, name: str) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert found.tobytes() == expected.tobytes(), name


def random_index(rng, shape: tuple[int, ...]) -> tuple[slice, ...]:
    ends = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in shape]
    return tuple(slice(*pair) if rng.random() < 0.8 else slice(None) for pair in ends)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_is_the_slice_of_the_whole_in_every_layout(tmp_path, dtype):
    tensors = random_tensors(dtype)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    weights, expected = hf.open_folder(tmp_path, RULES, SHAPES), whole_parameters(tensors)
    rng = np.random.default_rng(1)
    for path, value in expected.items():
        assert_same_bits(weights.read(path), value, path)
        for _ in range(20):
            index = random_index(rng, value.shape)
            assert_same_bits(weights.read(path, index), value[index], f"{path}{index}")


def test_layers_of_two_types_are_read_in_the_wider(tmp_path):
    tensors = random_tensors(DTYPES[1])
    tensors["layers.2.weight"] = tensors["layers.2.weight"].astype(np.float16)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    weights = hf.open_folder(tmp_path, RULES, SHAPES)
    expected = whole_parameters({name: value.astype(np.float32) for name, value in tensors.items()})
    assert_same_bits(weights.read("layers/kernel"), expected["layers/kernel"], "layers/kernel")
    assert weights.read("layers/qkv").dtype == DTYPES[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(tiny.MODELS["published pattern, twice a full block after three"], folder, torch.bfloat16)
    return folder


def network_of(folder) -> registry.Network:
    return registry.build("qwen2_5_vl", registry.family("qwen2_5_vl").read_config(*read_jsons(folder)))


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2), (8, 1, 1)], ids=str)
def test_import_reads_each_share_once_and_no_more(folder, sizes, monkeypatch):
    network, mesh = network_of(folder), sharding.make_mesh(Mesh(*sizes), jax.devices(), rows=8, heads={})
    whole = dict(hf.read_parameters(folder, network.rules, network.shapes))
    read, plainly = [], hf.Weights.read

    def recorded(weights, path, index):
        value = plainly(weights, path, index)
        read.append((path, value.shape, value.nbytes))
        return value

    monkeypatch.setattr(hf.Weights, "read", recorded)
    found = tree.flatten(runs.import_parameters(network, folder, mesh))
    places = tree.flatten(sharding.parameter_places(mesh, network.axes, network.shapes))
    assert found.keys() == whole.keys()
    for path, value in whole.items():
        assert found[path].sharding.is_equivalent_to(places[path], value.ndim), path
        assert_same_bits(np.asarray(found[path]), value.astype(np.float32), path)
        for shard in found[path].addressable_shards:
            np.testing.assert_array_equal(shard.data, value.astype(np.float32)[shard.index], err_msg=path)
    assert {(path, shape) for path, shape, _ in read} == {
        (path, place.shard_shape(whole[path].shape)) for path, place in places.items()
    }
    assert sum(nbytes for *_, nbytes in read) == sum(value.nbytes for value in whole.values())  # copies read nothing
    if sizes == (1, 8, 1):
        assert max(nbytes for *_, nbytes in read) * 4 < max(value.nbytes for value in whole.values())


# A child's own peak: VmHWM of this process would hide it. It imports numpy and hf, no JAX.
PEAK = """
import sys, pathlib
import numpy as np
from depthlm_jax import hf
def peak(): return next(int(l.split()[1]) / 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
rules = [hf.Rule("k", "k.{}", hf.LINEAR, "LDF"), hf.Rule("v", "v", hf.SAME, "VD")]
shapes = {"k": (16, 1024, 2048), "v": (16384, 1024)}  # 16 × 4 MiB and 32 MiB of float16
weights = hf.open_folder(pathlib.Path(sys.argv[1]), rules, shapes)
before = peak()
value = weights.read(*eval(sys.argv[2]))
print(value.nbytes / 2**20, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    "read, held_mib, most_mib",
    [
        ("('v', (slice(2048, 4096), slice(None)))", 4, 12),  # value and pages of an eighth, not 32
        ("('k', (slice(None), slice(None), slice(512, 768)))", 8, 14),  # one layer's pages beside it
        ("('k',)", 64, 76),  # and not 128: the mapped pages of layers that are done are gone
    ],
)
def test_memory_is_the_slice_and_one_mapped_share(tmp_path, read, held_mib, most_mib):
    tensors = {f"k.{i}": np.full((2048, 1024), i, np.float16) for i in range(16)}
    tensors["v"] = np.ones((16384, 1024), np.float16)
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", PEAK, str(tmp_path), read]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    nbytes_mib, grown_mib = map(float, done.stdout.split())
    assert nbytes_mib == held_mib
    assert grown_mib < most_mib


def in_order(parameters: dict[str, np.ndarray]):
    return ((rule.path, parameters[rule.path]) for rule in RULES)


@pytest.mark.parametrize("shard_bytes", [10**9, 1500])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_are_those_of_safetensors(tmp_path, monkeypatch, dtype, shard_bytes):
    """What its own writer would have written, and what its own readers read."""
    monkeypatch.setattr(hf, "SHARD_BYTES", shard_bytes)
    parameters = whole_parameters(random_tensors(np.dtype(np.float32)))
    hf.write_parameters(tmp_path, RULES, SHAPES, dtype, in_order(parameters))
    expected = {name: value.astype(dtype) for name, value in random_tensors(np.dtype(np.float32)).items()}
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes == 10**9)
    found = {}
    for file in files:
        read = safetensors.numpy.load_file(file)
        with safetensors.safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert len(safetensors.torch.load_file(file)) == len(read)
        header_bytes = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert header_bytes % 8 == 0
        assert file.stat().st_size == header_bytes + sum(value.nbytes for value in read.values())
        found |= read
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_bits(found[name], value, name)
    if len(files) > 1:
        index = json.loads((tmp_path / hf.INDEX).read_text())
        assert index["metadata"] == {
            "total_size": sum(value.nbytes for value in expected.values()),
            "total_parameters": sum(value.size for value in expected.values()),
        }


def test_tensors_of_several_types_stay_aligned(tmp_path):
    """PyTorch reads no float32 that begins at an odd half: wide ones come first in a file, whatever their order."""
    rng = np.random.default_rng(0)
    values = {f"{i}": rng.standard_normal(3 + 2 * i).astype(DTYPES[i % 3]) for i in range(7)}
    hf.write_tensors(tmp_path, {name: hf.Tensor(v.dtype, v.shape) for name, v in values.items()}, values.items())
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        np.testing.assert_array_equal(found[name].float().numpy(), value.astype(np.float32))
    for name, value in safetensors.numpy.load_file(tmp_path / "model.safetensors").items():
        assert_same_bits(value, values[name], name)


def test_parameters_are_held_one_at_a_time(tmp_path):
    """Each is let go before the next is asked for."""
    made = []

    def make(path: str) -> tuple[str, np.ndarray]:
        assert all(reference() is None for reference in made), f"one is still held when {path} is made"
        value = np.ones(SHAPES[path], np.float32)
        made.append(weakref.ref(value))
        return path, value

    hf.write_parameters(tmp_path, RULES, SHAPES, np.dtype(np.float32), (make(rule.path) for rule in RULES))
    assert len(made) == len(RULES)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda items: items[::-1], "in the place of"),
        (lambda items: items[:-1], "nothing"),
        (
            lambda items: [(path, value[..., :-1]) for path, value in items],
            r"same.weight float32\(24, 7\) in the place",
        ),
    ],
)
def test_a_writer_is_given_what_was_announced(tmp_path, change, says):
    items = list(in_order(whole_parameters(random_tensors(np.dtype(np.float32)))))
    with pytest.raises(ValueError, match=says):
        hf.write_parameters(tmp_path, RULES, SHAPES, np.dtype(np.float32), change(items))


def refused(folder) -> str:
    with pytest.raises(InputError) as error:
        hf.open_folder(folder, RULES, SHAPES)
    return str(error.value)


@pytest.mark.parametrize("dtype, name", [(np.int8, "I8"), (np.uint8, "U8"), (ml_dtypes.float8_e4m3fn, "F8_E4M3")])
def test_quantized_tensors_are_refused(tmp_path, dtype, name):
    tensors = random_tensors(DTYPES[1])
    for number in (1, 3):
        tensors[f"layers.{number}.weight"] = tensors[f"layers.{number}.weight"].astype(dtype)
    tensors["layers.1.weight_scale"] = np.ones(3, np.float32)  # which is unknown, but not what is wrong
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    text = refused(tmp_path)
    assert "the weights are quantized" in text
    assert f"2 tensors of type ['{name}'] ['layers.1.weight', 'layers.3.weight']" in text
    assert "['F32', 'BF16', 'F16']" in text and "dequantize" in text


@pytest.mark.parametrize("note", [{"quant_method": "awq", "bits": 4}, None])
def test_a_quantization_config_is_refused(tmp_path, note):
    safetensors.numpy.save_file(random_tensors(DTYPES[1]), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": note}))
    if note is None:
        hf.open_folder(tmp_path, RULES, SHAPES)
    else:
        assert 'config.json has quantization_config {"quant_method": "awq"' in refused(tmp_path)


def test_a_tensor_twice_is_refused(tmp_path):
    tensors = random_tensors(DTYPES[0])
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    safetensors.numpy.save_file({"scale.weight": tensors["scale.weight"]}, tmp_path / "other.safetensors")
    text = refused(tmp_path)
    assert "1 tensors are there twice" in text
    assert "['scale.weight'] in other.safetensors and in model.safetensors" in text
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")}))
    hf.open_folder(tmp_path, RULES, SHAPES)  # says which files count


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.9999])
def test_a_half_written_shard_is_refused(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(hf, "SHARD_BYTES", 3000)
    hf.write_parameters(tmp_path, RULES, SHAPES, DTYPES[0], in_order(whole_parameters(random_tensors(DTYPES[0]))))
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[: int(kept * len(content))])
    text = refused(tmp_path)
    assert f"{last.name}: cannot be read" in text and "download the file again" in text
