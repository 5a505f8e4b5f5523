import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthlm_jax.models import layers


@pytest.mark.parametrize("length, chunk", [(100, 100), (1024, 1024), (2304, 768), (9152, 832), (2 * 1031, 2 * 1031)])
def test_query_chunks_divide_the_length(length, chunk):
    assert layers.query_chunk(length) == chunk
    assert length % chunk == 0


def test_attention_in_chunks_of_queries_is_the_same(monkeypatch):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 48, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 2]], 16, axis=1))
    mask = layers.same_segment(segments, segments) & np.tri(48, dtype=bool)

    def both(q, k, v):
        out = layers.attention(q, k, v, mask)
        return jnp.sum(out**2), out

    gradient = jax.grad(both, argnums=(0, 1, 2), has_aux=True)
    whole = gradient(q, k, v)
    monkeypatch.setattr(layers, "MAX_QUERIES", 20)
    monkeypatch.setattr(layers, "MIN_QUERIES", 4)
    assert layers.query_chunk(48) == 16
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(gradient(q, k, v)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "kinds, runs",
    [("a", [("a", 0, 1)]), ("aab", [("a", 0, 2), ("b", 2, 3)]), ("abba", [("a", 0, 1), ("b", 1, 3), ("a", 3, 4)])],
)
def test_runs_of_equal_neighbours(kinds, runs):
    assert layers.runs_of(kinds) == runs
