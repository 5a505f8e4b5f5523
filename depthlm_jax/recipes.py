"""Recipe files and what else is a Python function in a file of the user's: loaded with errors that name their lines."""

import difflib
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path

import ml_collections

from depthlm_jax import config_errors
from depthlm_jax.errors import InputError

RECIPES = Path(__file__).parents[1] / "configs"


def names(folder: str = "") -> list[str]:
    """Returns the recipes that come with the code, or the files in a folder beside them."""
    return [f"configs/{file.relative_to(RECIPES)}" for file in sorted((RECIPES / folder).glob("*.py"))]


def load(recipe: str) -> ml_collections.ConfigDict:
    """Returns what the `get_config` of a recipe file returns; `recipe` may end in `:` and its argument."""
    config = call(recipe, "get_config", "recipe", names())
    if not isinstance(config, ml_collections.ConfigDict):
        raise InputError(
            f"{recipe.split(':', 1)[0]}: get_config() returns no recipe", found=type(config).__name__,
            expected="depthlm_jax.config.default_config(), changed", fix="end get_config() with: return config",
        )  # fmt: skip
    return config


def call(place: str, function: str, kind: str, known: list[str]) -> object:
    """Returns what a function of a Python file returns.

    Args:
      place: the file, and after a `:` the function's argument, if it is to have one.
      function: its name.
      kind: what the file is, for errors.
      known: files of this kind; the nearest is proposed where there is no such file.

    Raises:
      InputError: there is no such file, or it fails.
    """
    file, *argument = place.split(":", 1)
    if not Path(file).is_file():
        near = difflib.get_close_matches(Path(file).stem, [Path(name).stem for name in known], n=1)
        nearest = [name for name in known if Path(name).stem in near]
        raise InputError(
            f"unknown {kind} {file!r}", found="no such file", expected=f"one of {', '.join(known)}",
            fix=f"did you mean {nearest[0]}?" if nearest else f"give the path of a {kind}",
        )  # fmt: skip
    try:
        return runpy.run_path(file)[function](*argument)
    except InputError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise InputError(
            f"{file}:{line}: the {kind} cannot be run", found=f"{type(error).__name__}: {error}",
            expected=f"a file whose {function}() returns the {kind}", fix="correct that line; --debug shows more",
        ) from error  # fmt: skip


def fields(section: ml_collections.ConfigDict, path: str = "") -> Iterator[str]:
    """Gives the path of each field of a recipe."""
    for name, value in section.items():
        if isinstance(value, ml_collections.ConfigDict):
            yield from fields(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def changed(recipe: ml_collections.ConfigDict, changes: dict[str, object]) -> ml_collections.ConfigDict:
    """Returns a copy of a recipe with other values of some fields, by their paths.

    Raises:
      InputError: no such field; a value of another type.
    """
    copy, known = recipe.copy_and_resolve_references(), set(fields(recipe))
    for path, value in changes.items():
        if path not in known:
            raise config_errors.unknown_key(path, sorted(known))
        *sections, name = path.split(".")
        section = copy
        for step in sections:
            section = section[step]
        try:
            section[name] = value
        except TypeError as error:
            wanted = type(section[name]).__name__
            raise config_errors.bad_value(path, f"{value!r} of type {type(value).__name__}", wanted) from error
    return copy
