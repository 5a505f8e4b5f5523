"""'/'-paths of a nested dict of arrays."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np


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


def map_paths(function: Callable[[str], object], tree):
    """Returns the tree with `function(path)` in place of each leaf; parts that optax has masked stay masked."""
    return jax.tree_util.tree_map_with_path(lambda path, _: function("/".join(str(key.key) for key in path)), tree)


def cast(tree, dtype):
    """Returns the tree with its floating-point leaves in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def count(tree) -> int:
    """Returns the number of array elements, of abstract trees too."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
