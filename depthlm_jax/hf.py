"""Hugging Face folders: one table of rules a family, read in both directions.

A rule names a parameter here, the tensors it is made of there, how one becomes the other, and the parameter's axes.
Stacked parameters (`{}` in the tensor name) gather one tensor a layer on a leading L axis.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from depthlm_jax.errors import InputError

SHARD_BYTES = 5_000_000_000  # of the hub; transformers 5 would write 50 GB
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A pair of inverse functions between one HF tensor and one parameter (without L)."""

    read: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # (tensor, shape here) → parameter
    write: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # (parameter, shape there) → tensor
    there: Callable[[tuple[int, ...]], tuple[int, ...]]  # shape here → shape there


SAME = Layout(lambda x, _: x, lambda x, _: x, lambda s: s)
LINEAR = Layout(lambda x, _: x.T, lambda x, _: x.T, lambda s: s[::-1])  # [out, in] ↔ [in, out]
FUSED = Layout(  # [3·H, D] ↔ [D, 3, H]
    lambda x, s: x.T.reshape(s), lambda x, s: x.reshape(s[::-1]).T, lambda s: (s[1] * s[2], s[0])
)
FUSED_BIAS = Layout(lambda x, s: x.reshape(s), lambda x, s: x.reshape(s), lambda s: (s[0] * s[1],))  # [3·H] ↔ [3, H]


def patch_layout(channels: int, patch: int) -> Layout:
    """Returns Conv3d [D, colour, frame, p, p] ↔ [frame, colour·p·p, D]."""
    return Layout(
        lambda x, s: x.transpose(2, 1, 3, 4, 0).reshape(s),
        lambda x, s: x.reshape(s[2], s[1], s[3], s[4], s[0]).transpose(4, 1, 0, 2, 3),
        lambda s: (s[2], channels, s[0], patch, patch),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    path: str  # of the parameter here
    tensor: str  # name there; {} stands for the layer
    layout: Layout
    axes: str  # letters of the parameter's axes, L first where stacked; see sharding.py

    def tensors(self, shape: tuple[int, ...]) -> list[str]:
        """Returns the names of the tensors that a parameter of this shape is made of."""
        return [self.tensor.format(i) for i in range(shape[0])] if "{}" in self.tensor else [self.tensor]

    def shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.layout.there(shape[1:] if "{}" in self.tensor else shape)


def tensor_shapes(rules: list[Rule], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns {tensor name: shape} of the folder that parameters of these shapes make.

    Raises:
      InputError: a parameter without exactly one rule, or a rule without a parameter.
    """
    by_path = {rule.path: rule for rule in rules}
    if by_path.keys() != shapes.keys() or len(by_path) != len(rules):
        raise InputError(
            "weight rules do not match the model", found=sorted(by_path.keys() ^ shapes.keys()),
            expected="one rule a parameter", fix="correct the family's weights.py",
        )  # fmt: skip
    return {
        name: by_path[path].shape_there(shape)
        for path, shape in shapes.items()
        for name in by_path[path].tensors(shape)
    }


def read_parameters(
    folder: Path, rules: list[Rule], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, parameter) one at a time, in the dtype on disk.

    Raises:
      InputError: no weights, a tensor that is missing, unknown or of another shape; checked before the first yield.
    """
    files = _tensor_files(folder)
    expected = tensor_shapes(rules, shapes)
    _check_names(folder, expected, files)
    _check_shapes(folder, expected, files)
    for rule in rules:
        shape = shapes[rule.path]
        part = shape[1:] if "{}" in rule.tensor else shape
        parts = [rule.layout.read(_read(files[name], name), part) for name in rule.tensors(shape)]
        yield rule.path, (np.stack(parts) if "{}" in rule.tensor else parts[0])


def write_parameters(
    folder: Path,
    rules: list[Rule],
    parameters: dict[str, np.ndarray],
    dtype: np.dtype | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes model*.safetensors (and the index, where there are several files) in hub layout.

    Args:
      folder: exists.
      rules: of the family; one for each parameter.
      parameters: by path.
      dtype: on disk; None: each parameter's own.
      progress: called with the number of tensors written and of all tensors, after each file.
    """
    shapes = {path: tuple(value.shape) for path, value in parameters.items()}
    items = {
        name: np.dtype(dtype or parameters[rule.path].dtype).itemsize
        for rule in rules
        for name in rule.tensors(shapes[rule.path])
    }
    sizes = {name: int(np.prod(shape)) * items[name] for name, shape in tensor_shapes(rules, shapes).items()}
    groups = _split(sizes)
    tensors = _tensors(rules, parameters, dtype)
    weight_map = {}
    for number, names in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        content = {name: value for name, value in (next(tensors) for _ in names)}
        safetensors.numpy.save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        progress(len(weight_map), len(sizes))
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tensors(rules: list[Rule], parameters: dict, dtype) -> Iterator[tuple[str, np.ndarray]]:
    by_path = {rule.path: rule for rule in rules}
    for path, value in parameters.items():
        rule, stacked = by_path[path], np.asarray(value)
        shape = rule.shape_there(stacked.shape)
        for name, part in zip(rule.tensors(stacked.shape), stacked if "{}" in rule.tensor else [stacked], strict=True):
            yield name, np.ascontiguousarray(rule.layout.write(part, shape).astype(dtype or stacked.dtype))


def _split(sizes: dict[str, int]) -> list[list[str]]:
    groups, used = [[]], 0
    for name, size in sizes.items():
        if used + size > SHARD_BYTES and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _tensor_files(folder: Path) -> dict[str, Path]:
    index = folder / INDEX
    if index.exists():
        files = sorted({folder / name for name in _shards(index)})
    else:
        files = sorted(folder.glob("*.safetensors"))
    absent = [file.name for file in files if not file.exists()]
    if not files or absent:
        raise InputError(
            f"{folder}: no complete set of weights", found=f"missing {absent}" if absent else "no *.safetensors",
            expected=f"model.safetensors, or shards with {INDEX}", fix="download the folder again, or correct its path",
        )  # fmt: skip
    return {name: file for file in files for name in _open(file).keys()}  # noqa: SIM118 (not a dict)


def _shards(index: Path) -> list[str]:
    try:
        return list(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{index}: cannot be read", found=repr(error), expected="a JSON file with a weight_map",
            fix="download the file again",
        ) from error  # fmt: skip


def _open(file: Path):
    try:
        return safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: cannot be read", found=error, expected="a safetensors file", fix="download the file again"
        ) from error


def _read(file: Path, name: str) -> np.ndarray:
    return _open(file).get_tensor(name)


def _check_names(folder: Path, expected: dict, files: dict) -> None:
    missing, unknown = sorted(expected.keys() - files.keys()), sorted(files.keys() - expected.keys())
    if missing or unknown:
        raise InputError(
            f"{folder}: tensors do not match config.json",
            found=f"{len(missing)} missing {missing[:4]}; {len(unknown)} unknown {unknown[:4]}",
            expected=f"the {len(expected)} tensors of the hub layout",
            fix="use a folder in hub layout with the config.json it was saved with",
        )


def _check_shapes(folder: Path, expected: dict, files: dict) -> None:
    found = {name: tuple(_open(files[name]).get_slice(name).get_shape()) for name in expected}
    wrong = [f"{name} {found[name]}, expected {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise InputError(
            f"{folder}: {len(wrong)} tensors of another shape", found="; ".join(wrong[:4]),
            expected="the shapes that config.json implies", fix="use the config.json that the weights were saved with",
        )  # fmt: skip
