"""Weights → a Hugging Face folder that PyTorch loads."""

import contextlib
import dataclasses
import fnmatch
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from depthlm_jax import config as config_module
from depthlm_jax import files, hf, log
from depthlm_jax.checkpoint import Checkpoints
from depthlm_jax.errors import InputError
from depthlm_jax.models import lora, registry
from depthlm_jax.models.folder import COPIED
from depthlm_jax.run import Run, stored_dtype

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # fields of generation_config.json that are kept
WRITTEN = (*COPIED, "model*.safetensors", "model.safetensors.index.json", "README.md", "adapter_*", "depthlm.json")
NOTE = "depthlm"  # key in config.json, which other readers ignore; of an adapter, name of a file


def export_run(run: Run, output: Path, write_card: Callable[[int, Path], None] = lambda step, folder: None) -> int:
    """Returns the step whose parameters were written to `output`, in the dtype that the base folder names.

    Low-rank factors are merged into their kernels. One parameter at a time is in host memory.

    Args:
      run: with a checkpoint.
      output: is made, or replaced where it is an earlier export.
      write_card: called with the step and the folder, before the weights are written.
    """
    network = run.network
    with _staged(output) as staging, _opened(run) as checkpoints:
        step, read = checkpoints.open_parameters(network.shapes)
        parameters = ((rule.path, _merged(run, rule, read)) for rule in network.rules)
        registry.family(run.config.model.family).copy_published(run.base, staging)
        _decode_greedily(staging / "generation_config.json")
        write_card(step, staging)
        dtype, progress = stored_dtype(staging), log.Progress("tensors written")
        hf.write_parameters(staging, network.rules, network.hf_shapes, dtype, parameters, progress)
        config = staging / "config.json"
        files.write_json(config, {**files.read_json(config, "export again"), NOTE: _note(run.config)})
    return step


def export_adapter(run: Run, output: Path, base_model: str = "") -> int:
    """Returns the step whose low-rank factors were written to `output`, as a folder that `peft` loads, float32.

    Args:
      run: with a checkpoint.
      output: is made, or replaced where it is an earlier adapter.
      base_model: hub id of the weights that it stands beside; '': model.hf_dir.

    Raises:
      InputError: the run has no factors, or its other weights are random and nowhere else.
    """
    network, settings, base = run.network, run.config.model.lora, run.config.model.hf_dir
    if not network.lora_rules or not base:
        raise InputError(
            f"{run.workdir}: no adapter to export", found="model.lora.pattern is empty" if base else "random weights",
            expected="a run with low-rank factors, from a Hugging Face folder", fix="export without --adapter",
        )  # fmt: skip
    rules = lora.adapter_rules(network.lora_rules, registry.family(run.config.model.family).modules)
    with _staged(output, adapter=True) as staging, _opened(run) as checkpoints:
        step, read = checkpoints.open_parameters(network.shapes)
        shapes = {rule.path: network.shapes[rule.path] for rule in rules}
        hf.write_parameters(staging, rules, shapes, np.dtype(np.float32), ((path, read(path)) for path in shapes))
        (staging / "model.safetensors").rename(staging / "adapter_model.safetensors")
        targets = lora.targets(rules, network.shapes)
        files.write_json(staging / "adapter_config.json", lora.adapter_config(settings, targets, base_model or base))
        files.write_json(staging / f"{NOTE}.json", _note(run.config))
    return step


def _opened(run: Run) -> contextlib.AbstractContextManager:
    return contextlib.closing(Checkpoints(run.workdir, read_only=True))


def _merged(run: Run, rule: hf.Rule, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Returns a parameter as the Hugging Face folder has it."""
    factors = [f"{rule.path.removesuffix('/kernel')}/{name}" for name in lora.FACTORS]
    if factors[0] not in run.network.shapes:
        return read(rule.path)
    settings = run.config.model.lora
    return lora.merged(read(rule.path), *(read(path) for path in factors), settings, stacked=rule.stacked)


def convert_folder(source: Path, output: Path, family_name: str) -> None:
    """Writes the folder `source` again, a tensor at a time through our parameters, bit for bit in the dtype on disk."""
    family = registry.family(family_name)
    with _staged(output) as staging:
        for warning in family.copy_published(source, staging):
            log.say(f"warning: {warning}")
        network = registry.build(family_name, family.read_config(*read_jsons(staging)))
        weights = hf.open_folder(source, network.rules, network.hf_shapes)
        hf.write_tensors(staging, weights.tensors, weights.there_and_back(), log.Progress("tensors written"))


def read_jsons(folder: Path) -> tuple[dict, dict]:
    """Returns config.json and preprocessor_config.json of a folder."""
    names = "config.json", "preprocessor_config.json"
    return tuple(files.read_json(folder / name, "use a complete Hugging Face folder") for name in names)


@contextlib.contextmanager
def _staged(output: Path, *, adapter: bool = False) -> Iterator[Path]:
    """Yields a folder beside `output` that takes its place when all is written; an earlier export goes last."""
    refuse_foreign(output, adapter=adapter)
    output = output.resolve()
    files.make_writable(output.parent)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as beside:
        staging, old = Path(beside) / "new", Path(beside) / "old"
        staging.mkdir()
        yield staging
        if output.exists():
            output.rename(old)
        try:
            staging.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise


def refuse_foreign(output: Path, *, adapter: bool = False) -> None:
    """Raises InputError unless `output` is new, empty, or an earlier export of the same kind and nothing else.

    Args:
      output: what is to be written.
      adapter: whether that is an adapter.
    """
    config, note = output / "config.json", output / f"{NOTE}.json"
    earlier = note.is_file() or (config.is_file() and NOTE in files.read_json(config, "give another --output"))
    found = sorted(file.name for file in output.iterdir()) if output.is_dir() else []
    foreign = [name for name in found if not any(fnmatch.fnmatch(name, pattern) for pattern in WRITTEN)]
    if output.is_file() or output.is_mount() or (found and (not earlier or foreign or adapter != note.is_file())):
        raise InputError(
            f"{output} is not empty", found=(foreign or found)[:6] or "a file, or the root of a disk",
            expected="a new or empty folder, or an earlier export of the same kind and nothing else",
            fix="give another --output",
        )  # fmt: skip


def _decode_greedily(file: Path) -> None:
    """Keeps nothing of generation_config.json that would change an answer: a penalty on repetition changes digits."""
    values = files.read_json(file, "complete the folder") if file.is_file() else {}
    files.write_json(file, {name: values[name] for name in ENDS if name in values} | {"do_sample": False})


def _note(config: config_module.Config) -> dict:
    """Returns what whoever asks this model for a depth has to know."""
    data = config.data
    return {
        "focal_px": data.geometry.focal_px, "geometry": data.geometry.mode, "label_kind": data.label_kind,
        "reference": dataclasses.asdict(data.reference), "camera_hint": data.camera_hint, "unit": "m",
    }  # fmt: skip
