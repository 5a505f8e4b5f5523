import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthlm_jax import tree

NESTED = {"model": {"norm": {"scale": 1}, "layers": {"q": {"kernel": 2, "bias": 3}}}, "head": {"kernel": 4}}


def test_paths_and_back():
    flat = tree.flatten(NESTED)
    assert flat == {
        "model/norm/scale": 1, "model/layers/q/kernel": 2, "model/layers/q/bias": 3, "head/kernel": 4
    }  # fmt: skip
    assert tree.unflatten(flat) == NESTED


def test_paths_are_in_the_order_of_the_leaves():
    assert list(tree.flatten(NESTED).values()) == jax.tree.leaves(NESTED)


@pytest.mark.parametrize(("before", "after"), [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_cast_changes_floating_point_leaves_alone(before, after):
    cast = tree.cast({"a": jnp.ones(2, before), "n": jnp.ones(2, jnp.int32), "b": jnp.ones(2, bool)}, after)
    assert [leaf.dtype for leaf in (cast["a"], cast["n"], cast["b"])] == [after, jnp.int32, bool]


def test_count_of_arrays_and_of_abstract_ones():
    leaves = {"a": np.zeros((2, 3)), "b": {"c": np.zeros(4), "scalar": np.zeros(())}}
    assert tree.count(leaves) == 11
    assert tree.count(jax.eval_shape(lambda: leaves)) == 11
