import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from depthlm_jax.models import layers


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("unroll", [1, 2, 100])
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("kinds", ["a", "b", "abab", "baa", "aabaab", "abba", "aaab", "abbbab"])
def test_scan_equals_a_loop(kinds, remat, unroll):
    stacked = layers.stack(lambda r: nnx.Linear(4, 4, rngs=r), len(kinds), nnx.Rngs(0))
    carry, x_L2 = jnp.asarray(normal(3, 4)), jnp.asarray(normal(len(kinds), 2))

    def step(layer, carry, kind, x_2):
        carry = carry + (jnp.tanh(layer(carry)) if kind == "a" else jnp.sin(layer(carry)) * x_2.mean())
        return carry, {"sum": carry.sum(-1), "x": x_2}

    found, outputs = layers.scan_layers(stacked, step, carry, kinds, per_layer=x_L2, remat=remat, unroll=unroll)
    expected, expected_outputs = carry, []
    for number, kind in enumerate(kinds):
        expected, output = step(tiny.layer_of(stacked, number), expected, kind, x_L2[number])
        expected_outputs.append(output)
    assert tiny.distance(found, expected) <= 1e-6
    expected_sums = jnp.stack([output["sum"] for output in expected_outputs])
    assert tiny.distance(outputs["sum"], expected_sums) <= 1e-6 * max(1, jnp.abs(expected_sums).max())
    assert tiny.distance(outputs["x"], x_L2) == 0


def test_a_deeper_stack_is_not_a_longer_program():
    def matrix_products(kinds: str) -> int:
        stacked = layers.stack(lambda r: nnx.Linear(4, 4, rngs=r), len(kinds), nnx.Rngs(0))

        def step(layer, carry, kind, _):
            return layer(carry) if kind == "a" else jnp.tanh(layer(carry)), None

        return str(
            jax.make_jaxpr(lambda x: layers.scan_layers(stacked, step, x, kinds, remat="none"))(jnp.ones((3, 4)))
        ).count("dot_general")

    assert matrix_products("aaab" * 5) == matrix_products("aaab") == 2


@pytest.mark.parametrize(
    "kinds, runs",
    [("a", [("a", 0, 1)]), ("aab", [("a", 0, 2), ("b", 2, 3)]), ("abba", [("a", 0, 1), ("b", 1, 3), ("a", 3, 4)])],
)
def test_runs_of_equal_neighbours(kinds, runs):
    assert layers.runs_of(kinds) == runs
