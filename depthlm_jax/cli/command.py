"""What the commands share: flags, recipes, the JSON line, errors that end a program without a traceback."""

import difflib
import importlib
import json
import re
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from depthlm_jax import config as config_module
from depthlm_jax.errors import InputError

PROGRAM = "python -m depthlm_jax"
RECIPES = Path(__file__).parents[2] / "configs"


class UsageError(Exception):
    """The command line itself is wrong."""


def run(name: str, summary: str, arguments: list[str]) -> int:
    """Returns the exit status of a command: its module's `define_flags` and `run` do the work."""
    module = importlib.import_module(f"depthlm_jax.cli.{name}")
    values = flags.FlagValues()
    flags.DEFINE_bool("json", False, "print the result as one JSON object on the last line", flag_values=values)
    flags.DEFINE_bool("debug", False, "show the traceback of an error", flag_values=values)
    flags.DEFINE_bool("help", False, "show this page", short_name="h", flag_values=values)
    module.define_flags(values)
    debug = "--debug" in arguments
    try:
        _parse(values, name, arguments)
        if values.help:
            print(f"{PROGRAM} {name}: {summary}\n{values.get_help()}")
            return 0
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's global flags
        result = module.run(values)
    except UsageError as error:
        print(f"{error}\n\nusage: {PROGRAM} {name} --help", file=sys.stderr)
        return 2
    except (InputError, OSError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if values.json:
        print(json.dumps(result), flush=True)
    return 0


def define_config(values: flags.FlagValues) -> None:
    """Adds --config and, through it, --config.any.field=value."""
    config_flags.DEFINE_config_file(
        "config", None, "recipe file, for example configs/demo.py", flag_values=values, lock_config=True
    )


def define_path(values: flags.FlagValues, name: str, text: str) -> None:
    flags.DEFINE_string(name, "", text, flag_values=values)


def define_word(values: flags.FlagValues, words: list[str], text: str) -> None:
    """Adds --word, which may be written without its name; None if it was not given."""
    flags.DEFINE_enum("word", None, words, text, flag_values=values)


def read_config(values: flags.FlagValues) -> config_module.Config:
    """Returns the recipe with its overrides, validated."""
    if values.config is None:
        raise UsageError(f"--config is needed; recipes here: {', '.join(_recipes())}")
    return config_module.parse(values.config)


def read_path(values: flags.FlagValues, name: str) -> Path:
    """Returns the value of a path flag; raises UsageError if it was not given."""
    if not values[name].value:
        raise UsageError(f"--{name} is needed")
    return Path(values[name].value)


def _parse(values: flags.FlagValues, name: str, arguments: list[str]) -> None:
    _check_recipe(arguments)
    _check_overrides(arguments)
    try:
        rest = values([f"{PROGRAM} {name}", *arguments])[1:]
        if rest and "word" in values:
            values["word"].parse(rest.pop(0))
    except flags.Error as error:
        raise UsageError(str(error)) from error
    except (TypeError, ValueError) as error:
        raise InputError(
            "config: an override cannot be read", found=error,
            expected="--config.path=value, with a value of the field's type",
            fix="correct the override",
        ) from error  # fmt: skip
    if rest:
        raise UsageError(f"what is {' '.join(rest)!r}? flags are written --name=value")


def _check_recipe(arguments: list[str]) -> None:
    for file in [a.split("=", 1)[1].split(":")[0] for a in arguments if a.startswith("--config=")]:
        if not Path(file).is_file():
            near = difflib.get_close_matches(Path(file).stem, [Path(recipe).stem for recipe in _recipes()], n=1)
            raise InputError(
                f"unknown recipe {file!r}", found="no such file", expected=f"one of {', '.join(_recipes())}",
                fix=f"did you mean configs/{near[0]}.py?" if near else "give the path of a recipe",
            )  # fmt: skip


def _check_overrides(arguments: list[str]) -> None:
    """ml_collections names an unknown field, but not the nearest that exists."""
    known = [*config_module.flatten(config_module.Config())]
    for argument in arguments:
        if argument.startswith("--config."):
            path = argument.split("=", 1)[0].removeprefix("--config.")
            of_main = re.sub(r"^data\.sources\.[^.]+", "data.sources.main", path)  # a recipe names its own sources
            if of_main not in known and not path.startswith("model.hf_config."):
                raise config_module.unknown_key(path, known)


def _recipes() -> list[str]:
    return [f"configs/{file.name}" for file in sorted(RECIPES.glob("*.py"))]
