"""What converting a Hugging Face folder costs in time and memory, against copying its weights with cp.

Export reads every tensor into our layout and writes the folder again; import puts the weights on one CPU device in
float32. Each runs in a process of its own, whose imports do not count in seconds, but do in peak memory, and so do the
pages of mapped files. Before each, what others have written goes to the disk; at the end the tensors are compared.

The floor is one pass over the bytes in and one out, in cp's own time. Since export moves no byte within a tensor (both
transpositions cancel in numpy's strides) and maps instead of reading, a ratio near one was predicted, at the memory of
the imports and one tensor. Measured on two cores that six others shared: 0.6 (page faults are what cp, which copies in
the kernel, does not have) and 0.9 GB, of which the embedding is 0.6. Import takes 17.0 GB: 15.0 are the parameters.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors

from depthlm_jax import config as config_module
from depthlm_jax import files, hf, log, release, sharding
from depthlm_jax import run as runs
from depthlm_jax.errors import InputError
from depthlm_jax.models import registry

PEER = "cp"
ROOT = Path(__file__).parents[2]
PASSES = 3  # of cp and of export, in turns; their medians count
SPARE_BYTES = 2**30  # of the disk
WATCH_S = 0.005  # between two looks at a process
FAMILY, VOCABULARY = "qwen2_5_vl", 151936
HF_CONFIG = {  # the published sizes of 3B, of which configs/qwen2_5_vl_3b.py has every field
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
    "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "in_chans": 3, "hidden_act": "silu", "tokens_per_second": 2,
    },
}  # fmt: skip


def measure(given: Path | None) -> dict:
    """Returns seconds, GB/s and peak memory of cp, export and import, and how much faster export is than cp.

    Args:
      given: a Hugging Face folder; None: one with random weights is written.

    Raises:
      InputError: the disk is too small, a process ended early, or the exported weights are not those of the folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source, output = given.absolute() if given else Path(scratch) / "source", Path(scratch) / "output"
        if given is None:
            write_random(source)
        network = _network(source)
        weights = hf.open_folder(source, network.rules, network.shapes)
        size = sum(tensor.nbytes for tensor in weights.tensors.values())
        _check_disk(Path(scratch), size)
        taken = {"cp": [], "export": []}
        for _ in range(PASSES):
            for way, process in (("cp", _copy), ("export", _convert)):
                shutil.rmtree(output, ignore_errors=True)
                taken[way].append(process(source, output))
        compare(source, output)
        shutil.rmtree(output)
        taken["import"] = [in_a_process("import", source, output)]
    figures = {"bytes": size, "tensors": len(weights.tensors), "identical": True}
    for way, passes in taken.items():
        seconds = statistics.median(found["seconds"] for found in passes)
        figures |= {f"{way}_s": seconds, f"{way}_gb_s": size / 1e9 / seconds}
        figures[f"{way}_peak_gb"] = max(found["peak_gb"] for found in passes)
    return {"ratio": figures["cp_s"] / figures["export_s"], "peer": PEER, **figures}


def write_random(folder: Path) -> None:
    """Writes a folder of HF_CONFIG's sizes with random finite bfloat16 weights.

    Raises:
      InputError: the disk has no room for it and for its copy.
    """
    registry.family(FAMILY).write_scratch(HF_CONFIG, ["How far?"], folder)
    config = folder / "config.json"  # written for the small vocabulary of a few words
    files.write_json(config, files.read_json(config, "run again") | {"vocab_size": VOCABULARY})
    network = _network(folder)
    shapes, dtype = hf.tensor_shapes(network.rules, network.shapes), np.dtype(ml_dtypes.bfloat16)
    tensors = {name: hf.Tensor(dtype, shape) for name, shape in shapes.items()}
    _check_disk(folder, 2 * sum(tensor.nbytes for tensor in tensors.values()))
    generator = np.random.Generator(np.random.SFC64(0))

    def values(shape: tuple[int, ...]) -> np.ndarray:
        bits = generator.integers(0, 2**16, shape, dtype=np.uint16)
        return (bits & 0xBFFF).view(dtype)  # without the highest bit of the exponent: finite, below 2

    drawn = ((name, values(shape)) for name, shape in shapes.items())
    hf.write_tensors(folder, tensors, drawn, log.Progress("random tensors written"))


def compare(one: Path, other: Path) -> None:
    """Raises InputError unless two folders have tensors of the same names, dtypes, shapes and bytes.

    They are read with safetensors' own reader, not with ours.
    """
    ours, theirs = ({name: file for file in _weights(folder) for name in _names(file)} for folder in (one, other))
    differ = sorted(ours.keys() ^ theirs.keys())
    differ += [name for name in ours.keys() & theirs.keys() if not _same(name, ours[name], theirs[name])]
    if differ:
        raise InputError(
            f"{other}: not the weights of {one}", found=f"{len(differ)} tensors differ: {differ[:4]}",
            expected="the same names, dtypes, shapes and bytes", fix="report it with this output",
        )  # fmt: skip


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _names(file: Path) -> list[str]:
    with safetensors.safe_open(file, framework="numpy") as opened:
        return list(opened.keys())


def _same(name: str, *pair: Path) -> bool:
    a, b = (safetensors.safe_open(file, framework="numpy").get_tensor(name) for file in pair)
    return (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.view(np.uint8), b.view(np.uint8))


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise InputError(
            f"{folder}: the disk is too small", found=f"{free / 1e9:.1f} GB free",
            expected=f"{(needed + SPARE_BYTES) / 1e9:.1f} GB", fix="set TMPDIR to a folder on a larger disk",
        )  # fmt: skip


def _copy(source: Path, output: Path) -> dict:
    output.mkdir()
    os.sync()
    start = time.perf_counter()
    peak_gb, _ = _watched(["cp", *map(str, _weights(source)), str(output)])
    return {"seconds": time.perf_counter() - start, "peak_gb": peak_gb}


def _convert(source: Path, output: Path) -> dict:
    return in_a_process("export", source, output)


def in_a_process(way: str, source: Path, output: Path) -> dict:
    """Returns {"seconds": without imports, "peak_gb": with them} of "export" or "import"; raises if it ends early."""
    os.sync()
    peak_gb, said = _watched([sys.executable, "-m", "depthlm_jax.bench.convert", way, str(source), str(output)])
    return {"seconds": float(said.splitlines()[-1]), "peak_gb": peak_gb}


def _watched(command: list[str]) -> tuple[float, str]:
    """Returns the peak memory of a process in GB (0 where there is no /proc), and what it printed."""
    peak_gb = 0.0
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            peak_gb = _peak_gb(process.pid, peak_gb)
            time.sleep(WATCH_S)
        said.seek(0)
        text = said.read()
    if process.returncode != 0:
        raise InputError(
            f"bench convert: {' '.join(command[-3:])} ended early",
            found=f"exit status {process.returncode}: {text.strip()[-400:]}", expected="exit status 0",
            fix="correct what it says; without a word it was killed, and needs a machine with more memory",
        )  # fmt: skip
    return peak_gb, text


def _peak_gb(process: int, before: float) -> float:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return before
    return next((int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith("VmHWM")), before)


def _export(source: Path, output: Path) -> None:
    release.convert_folder(source, output, registry.family_of(source))


def _import(source: Path, _: Path) -> None:
    mesh = sharding.make_mesh(config_module.Mesh(1, 1, 1), runs.host_device(), rows=1, heads={})
    jax.block_until_ready(runs.import_parameters(_network(source), source, mesh))


def _network(folder: Path) -> registry.Network:
    name = registry.family_of(folder)
    return registry.build(name, registry.family(name).read_config(*release.read_jsons(folder)))


if __name__ == "__main__":
    way, *folders = sys.argv[1:]
    start = time.perf_counter()
    {"export": _export, "import": _import}[way](*map(Path, folders))
    print(time.perf_counter() - start)
