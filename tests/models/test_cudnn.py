"""What surrounds cuDNN's attention over packed rows; the kernel itself is in test_gpu.py."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthlm_jax.models import attention, cudnn
from depthlm_jax.models.attention import Among

IDS = np.array([[1, 1, 0, 2, 0, 2, 3, 0], [1, 2, 2, 2, 0, 0, 0, 0]])


def test_this_jax_has_what_is_called():
    names = {"q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "scale", "mask_type"}
    assert names <= set(inspect.signature(cudnn.dot_product_attention).parameters)
    assert {"PADDING", "PADDING_CAUSAL"} <= {kind.name for kind in cudnn.MaskType}


def by_extents(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
    """What JAX's documentation says that the kernel computes; other slots are NaN, as it may leave them."""
    slots, number = jnp.arange(q.shape[1]), jnp.zeros(q.shape[:2], int)
    for sample in range(q_seqlen.shape[1]):
        start, length = q_offsets[:, sample, None], q_seqlen[:, sample, None]
        number = jnp.where((start >= 0) & (slots >= start) & (slots < start + length), sample + 1, number)
    seen = (number[:, :, None] == number[:, None]) & (number > 0)[:, :, None]
    if mask_type == cudnn.MaskType.PADDING_CAUSAL:
        seen &= slots[:, None] >= slots
    return jnp.where((number > 0)[..., None, None], attention.masked(q, k, v, seen), jnp.nan)


def test_padding_goes_to_the_end_and_everything_else_keeps_its_order():
    order, place = cudnn.to_front(jnp.asarray(IDS > 0))
    np.testing.assert_array_equal(np.take_along_axis(IDS, np.asarray(order), 1)[0], [1, 1, 2, 2, 3, 0, 0, 0])
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(order), np.asarray(place), 1), [range(8)] * 2)


def test_extents_are_those_of_the_samples():
    lengths, starts = cudnn.extents(jnp.asarray(IDS))
    assert lengths.shape == (2, cudnn.MOST) and starts.shape == (2, cudnn.MOST + 1)
    np.testing.assert_array_equal(lengths[:, :4], [[2, 2, 1, -1], [1, 3, -1, -1]])
    np.testing.assert_array_equal(starts[:, :4], [[0, 2, 4, -1], [0, 1, -1, -1]])
    assert (lengths[:, 3:] == -1).all() and (starts[:, 3:] == -1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_output_and_gradients_are_those_of_the_row(monkeypatch, causal):
    monkeypatch.setattr(cudnn, "dot_product_attention", by_extents)
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 50, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    ids = np.sort(rng.integers(1, 5, (2, 50)), axis=1)
    ids[rng.random(ids.shape) < 0.2] = 0
    ids, cotangent = jnp.asarray(ids), jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def exact(q, k, v):
        out = attention.reference(q, k, v, Among(ids, causal=causal))
        return jnp.where((ids > 0)[..., None, None], out, 0)

    found, theirs = (
        (out, *back(cotangent))
        for out, back in (jax.vjp(f, q, k, v) for f in (lambda *x: cudnn.attend(*x, ids, causal), exact))
    )
    for ours, expected in zip(found, theirs, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_a_row_of_too_many_samples_is_not_computed_wrongly_in_silence(monkeypatch):
    monkeypatch.setattr(cudnn, "dot_product_attention", by_extents)
    monkeypatch.setattr(cudnn, "MOST", 2)
    x = jnp.ones((2, 8, 2, 8))
    out = cudnn.attend(x, x, x, jnp.asarray(IDS), causal=False)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
