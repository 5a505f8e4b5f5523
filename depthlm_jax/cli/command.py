"""What the commands share: flags, recipes, the JSON line, errors that end a program without a traceback."""

import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from depthlm_jax import config as config_module
from depthlm_jax import config_errors, recipes
from depthlm_jax.errors import InputError
from depthlm_jax.sweep import expand

PROGRAM = "python -m depthlm_jax"


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
            print(f"{PROGRAM} {name}: {summary}\n{_help(values)}")
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
        "config", None, "recipe file, for example configs/demo.py; any field of it is changed with "
        "--config.section.field=value; depthlm_jax/config.py says what each means", flag_values=values,
        lock_config=True,
    )  # fmt: skip


def define_path(values: flags.FlagValues, name: str, text: str) -> None:
    flags.DEFINE_string(name, "", text, flag_values=values)


def define_text(values: flags.FlagValues, name: str, text: str) -> None:
    flags.DEFINE_string(name, "", text, flag_values=values)


def define_word(values: flags.FlagValues, words: list[str], text: str) -> None:
    """Adds --word, which may be written without its name; None if it was not given."""
    flags.DEFINE_enum("word", None, words, text, flag_values=values)


def read_config(values: flags.FlagValues) -> config_module.Config:
    """Returns the recipe with its overrides, validated."""
    if values.config is None:
        raise UsageError(f"--config is needed; recipes here: {', '.join(recipes.names())}")
    return config_module.parse(values.config)


def read_path(values: flags.FlagValues, name: str) -> Path:
    """Returns the value of a path flag; raises UsageError if it was not given."""
    if not values[name].value:
        raise UsageError(f"--{name} is needed")
    return Path(values[name].value)


def overrides(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    """Returns --config.any.field=value of a command line as they were written, each in one word."""
    given, words = [], iter(arguments)
    for word in words:
        found = re.match(r"--?(no)?(config\.[^=]+)(=?)", word)
        if found:
            apart = not (found[1] or found[3] or values[found[2]].boolean)
            given.append(f"{word}={next(words)}" if apart else word)
    return given


def _help(values: flags.FlagValues) -> str:
    """Returns the command's own flags, without absl's and without headings of modules."""
    lines = values.get_help().split("\nabsl.flags:")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(" "))


def _parse(values: flags.FlagValues, name: str, arguments: list[str]) -> None:
    if "sweep" in values:
        arguments = _with_recipe(arguments)
    if "config" in values:
        _check_config(arguments)
    try:
        rest = values([f"{PROGRAM} {name}", *arguments])[1:]
        if rest and "word" in values:
            values["word"].parse(rest.pop(0))
    except flags.Error as error:
        raise UsageError(str(error)) from error
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise InputError(
            "config: an override cannot be read", found=error,
            expected="--config.path=value, with a value of the field's type",
            fix="correct the override",
        ) from error  # fmt: skip
    if rest:
        raise UsageError(f"what is {' '.join(rest)!r}? flags are written --name=value")


def _with_recipe(arguments: list[str]) -> list[str]:
    """Returns the arguments with the recipe of --sweep in front, unless one is given: --config.… changes its fields."""
    if any(re.match("--?config(=|$)", argument) for argument in arguments):
        return arguments
    pairs = itertools.pairwise([*arguments, ""])
    places = [one.partition("=")[2] or after for one, after in pairs if re.match("--?sweep(=|$)", one)]
    return [*(f"--config={expand.load(place).recipe}" for place in places[-1:]), *arguments]


def _check_config(arguments: list[str]) -> None:
    """Raises InputError, where ml_collections would show a traceback, for a wrong recipe or override."""
    recipe = None
    for argument, after in itertools.pairwise([*arguments, ""]):
        if re.match("--?config(=|$)", argument):
            recipe = recipes.load(argument.partition("=")[2] or after)
        override = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if override and recipe is not None:
            _check_override(override[1], recipe)


def _check_override(path: str, recipe: ml_collections.ConfigDict) -> None:
    field = re.sub(r"(\[[^]]*])+$", "", path)  # an item of a list
    known = list(recipes.fields(recipe))
    if field not in known:
        raise config_errors.unknown_key(field, known)
