"""What needs an NVIDIA GPU: cuDNN's attention in bfloat16 beside exact attention, forwards and backwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthlm_jax.models import attention
from depthlm_jax.models.attention import Among

CASES = {  # rows, length, heads, key heads, width, branches
    "decoder": (2, 1000, 16, 2, 128, 0),
    "questions": (2, 1500, 4, 2, 128, 3),
    "images": (1, 4480, 16, 16, 80, None),
}
TOLERANCE = 0.02  # of the largest entry; bfloat16 has eight bits


@pytest.fixture(scope="module")
def gpu():
    if jax.devices()[0].platform != "gpu":
        pytest.skip("no GPU: run with JAX_PLATFORMS=cuda where there is one")
    return jax.devices()[:1]


@pytest.mark.parametrize("case", CASES)
def test_cudnn_attends_as_exact_attention_does(gpu, case):
    rows, length, heads, key_heads, width, branches = CASES[case]
    rng = np.random.default_rng(7)
    shapes = [(rows, length, n, width) for n in (heads, key_heads, key_heads, heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    cuts = np.sort(rng.integers(1, length, (rows, 3)), axis=1)
    ids = (np.arange(length) >= cuts[:, :, None]).sum(axis=1) + 1
    ids[:, length - 17 :] = 0  # padding, for images also between their patches
    if branches is None:
        ids[rng.random(ids.shape) < 0.1] = 0
    branch = rng.integers(0, branches + 1, (rows, length)) if branches else np.zeros_like(ids)
    among = Among(jnp.asarray(ids), None if branches is None else jnp.asarray(branch), causal=branches is not None)
    seen = (ids > 0)[..., None, None]
    cudnn = attention.make("cudnn", branches=branches or 0, devices=gpu)

    def with_gradients(attend, dtype, arrays):
        q, k, v, cotangent = (x.astype(dtype) for x in arrays)
        out, back = jax.vjp(lambda *qkv: jnp.where(seen, attend(*qkv, among), 0), q, k, v)
        return out, *back(cotangent)

    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda arrays: with_gradients(dense, jnp.float32, arrays))(arrays)
    found = jax.jit(lambda arrays: with_gradients(cudnn, jnp.bfloat16, arrays))(arrays)
    for name, ours, theirs in zip(("out", "d_q", "d_k", "d_v"), found, exact, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs)
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max(), name


def dense(q, k, v, among: Among):
    seen_BTS = attention.visible(among, np.arange(q.shape[1]), among)
    return jax.nn.dot_product_attention(q, k, v, mask=seen_BTS[:, None])
