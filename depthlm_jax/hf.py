"""Hugging Face folders: one table of rules a family, read in both directions.

A rule names a parameter here, the tensors it is made of there, how one becomes the other, and the parameter's axes.
Stacked parameters (`{}` in the tensor name) gather one tensor a layer on a leading L axis.

Both directions are streams. Reading maps one tensor at a time and copies the slice that is asked for; a mapping ends
with its tensor, so that read pages do not pile up. Writing makes the header first, which follows from shapes and dtypes
alone, then tensors as they come. A file is: u64 length of the header | JSON, padded to 8 bytes | raw tensors.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from depthlm_jax import files
from depthlm_jax.errors import InputError

SHARD_BYTES = 5_000_000_000  # of the hub; transformers 5 would write 50 GB
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A pair of inverse functions between one HF tensor and one parameter (without L).

    They move axes and copy nothing where numpy can help it: a slice of what `read` returns is a slice of the file.
    """

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

    @property
    def stacked(self) -> bool:
        return "{}" in self.tensor

    def tensors(self, shape: tuple[int, ...]) -> list[str]:
        """Returns the names of the tensors that a parameter of this shape is made of."""
        return [self.tensor.format(i) for i in range(shape[0])] if self.stacked else [self.tensor]

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape, of a parameter of this shape, that is made of one tensor."""
        return shape[1:] if self.stacked else shape

    def shape_there(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.layout.there(self.part(shape))


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


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What the header of a file says of a tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    file: Path
    offset: int  # of its first byte in the file
    dtype: str  # as the header names it
    shape: tuple[int, ...]

    def map(self) -> np.ndarray:
        """Returns the tensor without reading it: pages are read as they are used, and dropped with the array."""
        return np.asarray(np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape))


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a folder, known to be complete; nothing of them is held in memory."""

    rules: dict[str, Rule]  # by path, in the order of the table
    shapes: dict[str, tuple[int, ...]]  # of the parameters, by path
    stored: dict[str, Stored]  # by name of the tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Dtype and shape of each tensor, in the order of the rules."""
        names = [name for path, rule in self.rules.items() for name in rule.tensors(self.shapes[path])]
        return {name: Tensor(DTYPES[self.stored[name].dtype], self.stored[name].shape) for name in names}

    def read(self, path: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Returns a slice of a parameter, in the dtype and the memory order of the file, of which it reads no more.

        Args:
          path: of the parameter.
          index: one slice an axis; None: all of it.
        """
        rule, shape = self.rules[path], self.shapes[path]
        index = index or (slice(None),) * len(shape)
        if not rule.stacked:
            return np.array(self._parameter(rule, rule.tensor, shape)[index])
        names = rule.tensors(shape)[index[0]]
        first = self._parameter(rule, names[0], shape[1:])[index[1:]]
        order = np.argsort([-stride for stride in first.strides], kind="stable")  # a copy along the file is fast
        dtypes = {DTYPES[self.stored[name].dtype] for name in names}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.float32
        held = np.empty((len(names), *(first.shape[axis] for axis in order)), dtype)
        for layer, name in zip(held, names, strict=True):
            layer[...] = self._parameter(rule, name, shape[1:])[index[1:]].transpose(order)
        return held.transpose(0, *(1 + np.argsort(order)))

    def there_and_back(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, tensor) in the order of the rules, each made from the parameter that it becomes here."""
        for path, rule in self.rules.items():
            for name in rule.tensors(self.shapes[path]):
                part = rule.part(self.shapes[path])
                yield name, rule.layout.write(self._parameter(rule, name, part), self.stored[name].shape)

    def _parameter(self, rule: Rule, name: str, part: tuple[int, ...]) -> np.ndarray:
        return rule.layout.read(self.stored[name].map(), part)


def open_folder(folder: Path, rules: list[Rule], shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Returns the weights of a folder, to be read a tensor at a time.

    Args:
      folder: in hub layout.
      rules: of the family; one for each parameter.
      shapes: of the parameters, by path.

    Raises:
      InputError: no weights, quantized weights, a tensor that is missing, unknown, of another shape, or there twice.
    """
    expected = tensor_shapes(rules, shapes)
    stored = _stored_tensors(folder)
    _check_dtypes(folder, stored)
    _check_names(folder, expected, stored)
    _check_shapes(folder, expected, stored)
    return Weights({rule.path: rule for rule in rules}, shapes, stored)


def read_parameters(
    folder: Path, rules: list[Rule], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path, parameter) in the order of the rules, each whole, in the dtype on disk; raises as `open_folder`."""
    weights = open_folder(folder, rules, shapes)
    for path in weights.rules:
        yield path, weights.read(path)


def write_parameters(
    folder: Path,
    rules: list[Rule],
    shapes: dict[str, tuple[int, ...]],
    dtype: np.dtype,
    parameters: Iterable[tuple[str, np.ndarray]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes parameters as the weights of a folder in hub layout; holds one of them at a time.

    Args:
      folder: exists.
      rules: of the family; one for each parameter.
      shapes: of the parameters, by path.
      dtype: on disk.
      parameters: (path, parameter) in the order of the rules; an iterator that keeps nothing keeps memory low.
      progress: called with the number of tensors written and of all tensors, after each.
    """
    known = tensor_shapes(rules, shapes)
    names = [name for rule in rules for name in rule.tensors(shapes[rule.path])]
    tensors = {name: Tensor(np.dtype(dtype), known[name]) for name in names}
    write_tensors(folder, tensors, _converted(rules, shapes, np.dtype(dtype), parameters), progress)


def _converted(rules, shapes, dtype, parameters) -> Iterator[tuple[str, np.ndarray]]:
    by_path = {rule.path: rule for rule in rules}
    for path, value in parameters:
        rule, there = by_path[path], by_path[path].shape_there(shapes[path])
        for layer, name in enumerate(rule.tensors(shapes[path])):
            # The axes first: they move faster in 4 bytes than in 2.
            moved = np.ascontiguousarray(rule.layout.write(value[layer] if rule.stacked else value, there))
            yield name, moved.astype(dtype, copy=False)
        del value, moved  # before the next is made


def write_tensors(
    folder: Path,
    tensors: dict[str, Tensor],
    values: Iterable[tuple[str, np.ndarray]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes model*.safetensors (and the index, where there are several files); holds one tensor at a time.

    Args:
      folder: exists.
      tensors: what is written, in this order.
      values: (name, tensor), as many and in the same order.
      progress: called with the number of tensors written and of all tensors, after each.

    Raises:
      ValueError: `values` are not what `tensors` says.
    """
    groups, values, weight_map = _split(tensors), iter(values), {}
    for number, names in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, places = _header({name: tensors[name] for name in names})
        with (folder / file).open("wb") as out:
            out.write(header)
            for name in names:
                found, value = next(values, ("nothing", np.empty(0)))  # no zip: it would hold on to a tensor
                if (found, value.dtype, value.shape) != (name, tensors[name].dtype, tensors[name].shape):
                    raise ValueError(f"{found} {value.dtype}{value.shape} in the place of {name} {tensors[name]}")
                out.seek(len(header) + places[name])
                out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
                del value
                weight_map[name] = file
                progress(len(weight_map), len(tensors))
    if next(values, None) is not None:
        raise ValueError("more values than tensors")
    if len(groups) > 1:
        sums = {
            "total_size": sum(tensor.nbytes for tensor in tensors.values()),
            "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        }
        files.write_json(folder / INDEX, {"metadata": sums, "weight_map": weight_map})


def _header(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Returns the beginning of a file, and where after it each tensor begins; wide dtypes first, to be aligned."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries, places, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        places[name], end = end, end + tensor.nbytes
        entries[name] = {"dtype": names[tensor.dtype], "shape": tensor.shape, "data_offsets": (places[name], end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _split(tensors: dict[str, Tensor]) -> list[list[str]]:
    groups, used = [[]], 0
    for name, tensor in tensors.items():
        if used + tensor.nbytes > SHARD_BYTES and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += tensor.nbytes
    return groups


def _stored_tensors(folder: Path) -> dict[str, Stored]:
    index, stored = folder / INDEX, {}
    paths = sorted({folder / name for name in _shards(index)} if index.exists() else folder.glob("*.safetensors"))
    absent = [file.name for file in paths if not file.exists()]
    if not paths or absent:
        raise InputError(
            f"{folder}: no complete set of weights", found=f"missing {absent}" if absent else "no *.safetensors",
            expected=f"model.safetensors, or shards with {INDEX}", fix="download the folder again, or correct its path",
        )  # fmt: skip
    for file in paths:
        found = _read_header(file)
        twice = sorted(found.keys() & stored.keys())
        if twice:
            raise InputError(
                f"{folder}: {len(twice)} tensors are there twice",
                found=f"{twice[:4]} in {file.name} and in {stored[twice[0]].file.name}",
                expected="each tensor in one file", fix=f"remove the files that do not belong there, or add {INDEX}",
            )  # fmt: skip
        stored |= found
    return stored


def _shards(index: Path) -> list[str]:
    try:
        return list(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{index}: cannot be read", found=repr(error), expected="a JSON file with a weight_map",
            fix="download the file again",
        ) from error  # fmt: skip


def _read_header(file: Path) -> dict[str, Stored]:
    try:
        with safetensors.safe_open(file, framework="numpy"):  # checks that header and length agree
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: cannot be read", found=error, expected="a safetensors file", fix="download the file again"
        ) from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    return {
        name: Stored(file, 8 + length + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


def _check_dtypes(folder: Path, stored: dict[str, Stored]) -> None:
    """Raises InputError if the weights are quantized, by config.json or by what they are stored as."""
    config = folder / "config.json"
    values = files.read_json(config, "download the file again") if config.is_file() else {}
    how = values.get("quantization_config")
    other = {name: tensor.dtype for name, tensor in stored.items() if tensor.dtype not in DTYPES}
    found = [f"config.json has quantization_config {json.dumps(how)[:80]}"] if how else []
    found += [f"{len(other)} tensors of type {sorted(set(other.values()))} {sorted(other)[:3]}"] if other else []
    if found:
        raise InputError(
            f"{folder}: the weights are quantized", found="; ".join(found), expected=f"tensors of type {list(DTYPES)}",
            fix="use the folder that was quantized, or dequantize it (in transformers: model.dequantize()) and save it",
        )  # fmt: skip


def _check_names(folder: Path, expected: dict, stored: dict) -> None:
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or unknown:
        raise InputError(
            f"{folder}: tensors do not match config.json",
            found=f"{len(missing)} missing {missing[:4]}; {len(unknown)} unknown {unknown[:4]}",
            expected=f"the {len(expected)} tensors of the hub layout",
            fix="use a folder in hub layout with the config.json it was saved with",
        )


def _check_shapes(folder: Path, expected: dict, stored: dict[str, Stored]) -> None:
    found = {name: stored[name].shape for name in expected}
    wrong = [f"{name} {found[name]}, expected {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise InputError(
            f"{folder}: {len(wrong)} tensors of another shape", found="; ".join(wrong[:4]),
            expected="the shapes that config.json implies", fix="use the config.json that the weights were saved with",
        )  # fmt: skip
