"""Which parameters a run trains, and at which share of the learning rate."""

import difflib
import re
from collections.abc import Iterable, Mapping

from depthlm_jax import config, tree
from depthlm_jax.errors import InputError


def factors(paths: Iterable[str], groups: Mapping[str, config.Group], low_rank: Iterable[str] = ()) -> dict[str, float]:
    """Returns {path: factor of its learning rate}; 0: frozen. Parameters in no group have factor 1.

    Args:
      paths: of all parameters.
      groups: of the config.
      low_rank: of the low-rank factors; where there are some, all others are frozen and in no group.

    Raises:
      InputError: a pattern that is no regular expression or matches nothing, a parameter that two match, or nothing
        left to train.
    """
    every = list(paths)
    paths = list(low_rank) or every
    owner: dict[str, str] = {}
    for name, group in groups.items():
        for path in _matches(name, group.pattern, paths):
            if path in owner:
                raise InputError(
                    f"config: optim.groups.{owner[path]} and optim.groups.{name} share a parameter", found=path,
                    expected="one group, or none, for each parameter",
                    fix=f"narrow --config.optim.groups.{name}.pattern",
                )  # fmt: skip
            owner[path] = name
    found = {path: groups[owner[path]].factor if path in owner else 1.0 for path in paths}
    if not any(found.values()):
        raise InputError(
            "config: optim.groups freeze every parameter", found=", ".join(f"{name}: factor 0" for name in groups),
            expected="something to train", fix="narrow a pattern, or give a factor above 0",
        )  # fmt: skip
    return dict.fromkeys(every, 0.0) | found


def _matches(name: str, pattern: str, paths: list[str]) -> list[str]:
    """Returns the paths that a group's pattern matches from end to end."""
    field = f"optim.groups.{name}.pattern"
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"config: bad value of {field}", found=f"{pattern!r}: {error}", expected="a regular expression",
            fix=f"set --config.{field}='visual/.*', for example",
        ) from error  # fmt: skip
    found = [path for path in paths if rule.fullmatch(path)]
    if not found:
        parts = [path for path in paths if rule.search(path)]
        near = parts or difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
        tops = sorted({path.split("/")[0] for path in paths})
        raise InputError(
            f"config: {field} matches no parameter", found=repr(pattern),
            expected=f"a whole path, such as {', '.join(near[:3])}; all begin with {' or '.join(tops)}",
            fix=f"set --config.{field}=" + (f"'.*({pattern}).*'" if parts else f"'{tops[0]}/.*', for example"),
        )  # fmt: skip
    return found


def split(parameters: Mapping, factor: Mapping[str, float]) -> tuple[dict, dict]:
    """Returns (trained, frozen) parameters, each a nested dict of its part."""
    leaves = tree.flatten(parameters).items()
    trained, frozen = ({path: leaf for path, leaf in leaves if bool(factor[path]) is kind} for kind in (True, False))
    return tree.unflatten(trained), tree.unflatten(frozen)


def join(trained: Mapping, frozen: Mapping) -> dict:
    """Returns the parameters that `split` took apart."""
    return tree.unflatten(tree.flatten(trained) | tree.flatten(frozen))
