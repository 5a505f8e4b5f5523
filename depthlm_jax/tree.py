"""'/'-paths of a nested dict of arrays, and tables that must match them exactly once."""

import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from depthlm_jax.errors import InputError


def flatten(tree: Mapping) -> dict[str, object]:
    """Returns {'model/norm/scale': leaf, …} in the tree's own order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[str, object]) -> dict:
    """Returns the nested dict that `flatten` came from."""
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def match_once(patterns: Iterable[str], paths: Iterable[str], what: str) -> dict[str, str]:
    """Returns {path: pattern}; patterns are regular expressions for the whole path.

    Raises:
      InputError: a path that no pattern or more than one matches, or a pattern that matches no path.
    """
    patterns, paths = list(patterns), list(paths)
    matches = {path: [pattern for pattern in patterns if re.fullmatch(pattern, path)] for path in paths}
    wrong = [f"{path}: {found or 'no match'}" for path, found in matches.items() if len(found) != 1]
    used = {pattern for found in matches.values() for pattern in found}
    wrong += [f"{pattern}: matches nothing" for pattern in patterns if pattern not in used]
    if wrong:
        raise InputError(what, found="; ".join(wrong[:8]), expected="each path matched by exactly one pattern, each "
                         "pattern used", fix="correct the patterns")  # fmt: skip
    return {path: found[0] for path, found in matches.items()}


def cast(tree, dtype):
    """Returns the tree with its floating-point leaves in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def count(tree) -> int:
    """Returns the number of array elements, of abstract trees too."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
