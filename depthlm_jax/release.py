"""Weights → a Hugging Face folder that PyTorch loads."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from depthlm_jax import config as config_module
from depthlm_jax import files, hf, log
from depthlm_jax.checkpoint import Checkpoints
from depthlm_jax.errors import InputError
from depthlm_jax.models import lora, registry
from depthlm_jax.run import Run, stored_dtype

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # fields of generation_config.json that are kept
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


def export_adapter(run: Run, output: Path) -> int:
    """Returns the step whose low-rank factors were written to `output`, as a folder that `peft` loads, float32.

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
    with _staged(output) as staging, _opened(run) as checkpoints:
        step, read = checkpoints.open_parameters(network.shapes)
        shapes = {rule.path: network.shapes[rule.path] for rule in rules}
        hf.write_parameters(staging, rules, shapes, np.dtype(np.float32), ((path, read(path)) for path in shapes))
        (staging / "model.safetensors").rename(staging / "adapter_model.safetensors")
        targets = lora.targets(rules, network.shapes)
        files.write_json(staging / "adapter_config.json", lora.adapter_config(settings, targets, base))
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
def _staged(output: Path) -> Iterator[Path]:
    """Yields a folder beside `output` that takes its place when all is written; an earlier export goes last."""
    _refuse_foreign(output)
    staging, old = (output.with_name(f"{output.name}.{state}") for state in ("incomplete", "old"))
    shutil.rmtree(staging, ignore_errors=True)
    files.make_writable(staging)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if output.exists():
        output.rename(old)
    staging.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign(output: Path) -> None:
    """Raises InputError if `output` is a file, or holds anything but an earlier export of a run."""
    config = output / "config.json"
    ours = (output / f"{NOTE}.json").is_file()
    ours = ours or (config.is_file() and NOTE in files.read_json(config, "give another --output"))
    found = ["a file"] if output.is_file() else sorted(file.name for file in output.glob("*"))
    if found and not ours:
        raise InputError(
            f"{output} is not empty", found=found[:6],
            expected="a new or empty folder, or an earlier export of a run", fix="give another --output",
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
