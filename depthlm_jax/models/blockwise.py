"""Attention in plain XLA over packed rows, block by block; nothing of size T × T is kept or computed.

A chunk of queries meets one block of keys after another and keeps a running softmax; blocks in which it sees nothing
(other samples, later tokens) are not visited. The backward pass computes the weights again from the largest score and
the sum that the forward pass found. Scores are rounded anew there, so that errors grow with them: a gradient is off by
1e-5 of its largest entry at scores of 40, by 2e-5 at 120. Source: Dao et al. 2022 (FlashAttention), with the visited
range of keys as in its block-sparse form.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

ATTENDED = "attended"  # checkpoint name of what attention gives, and of what its backward pass needs of it
CHUNK, BLOCK = 256, 512  # queries and keys that meet at a time: the scores of a head stay in a core's cache
NEVER = -1e30  # logit of an invisible key


class Marks(NamedTuple):
    """Who sees whom, of one row: ids as in `attention.Among`; a key of branch 0 is seen by all branches."""

    ids_T: jax.Array
    branch_T: jax.Array


def attend(q_BTNK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array, ids_BT, branch_BT, causal: bool) -> jax.Array:
    """Returns out_BTNK; that of padding (id 0) is zero. Fewer key heads are shared (GQA)."""
    rows, length, heads, width = q_BTNK.shape
    key_heads = k_BTNK.shape[2]
    chunk = min(CHUNK, -(-length // 8) * 8)
    block = min(BLOCK, -(-length // chunk) * chunk)
    more = -length % max(chunk, block)

    def by_head(x_BTNK: jax.Array) -> jax.Array:
        return jnp.moveaxis(jnp.pad(x_BTNK, ((0, 0), (0, more), (0, 0), (0, 0))), 1, 2)

    scaled_BTNK = q_BTNK * jnp.asarray(width**-0.5, q_BTNK.dtype)
    q_BNGTK = by_head(scaled_BTNK).reshape(rows, key_heads, heads // key_heads, length + more, width)
    marks = Marks(*(jnp.pad(x, ((0, 0), (0, more))) for x in (ids_BT, branch_BT)))
    run = _differentiable(chunk, block, causal)
    out_BNGTK = run(q_BNGTK, by_head(k_BTNK), by_head(v_BTNK), marks)
    return jnp.moveaxis(out_BNGTK.reshape(rows, heads, length + more, width), 1, 2)[:, :length]


def _differentiable(chunk: int, block: int, causal: bool) -> Callable:
    """Returns attend(q_BNGTK, k_BNSK, v_BNSK, marks) → out_BNGTK with its own backward pass."""

    def forward(q, k, v, marks):
        made = lax.map(lambda row: _forward_row(*row, chunk, block, causal), (q, k, v, marks))
        out, top, share = checkpoint_name(made, ATTENDED)
        return out, (q, k, v, marks, out, top, share)

    def backward(kept, d_out):
        return (*lax.map(lambda row: _backward_row(*row, chunk, block, causal), (*kept, d_out)), None)

    run = jax.custom_vjp(lambda q, k, v, marks: forward(q, k, v, marks)[0])
    run.defvjp(forward, backward)
    return run


def _forward_row(q_NGTK, k_NSK, v_NSK, marks: Marks, chunk: int, block: int, causal: bool):
    """Returns out_NGTK, and of each softmax the largest score, top_NGT, and 1 / denominator, share_NGT."""
    first, last = visited(marks.ids_T, chunk, block, causal)
    k_NKS = jnp.swapaxes(k_NSK, 1, 2)

    def of_chunk(number):
        q_NRK = _chunk_of(q_NGTK, number, chunk)

        def meet(place, running):
            top_NR, sum_NR, out_NRK = running
            seen_RS = _seen(marks, number, chunk, place, block, causal, q_NGTK.shape[1])
            score_NRS = jnp.where(seen_RS, _dot(q_NRK, _block_of(k_NKS, place, block, axis=2)), NEVER)
            higher_NR = jnp.maximum(top_NR, score_NRS.max(-1))
            weight_NRS = jnp.where(seen_RS, jnp.exp(score_NRS - higher_NR[..., None]), 0.0)
            shrunk_NR = jnp.exp(top_NR - higher_NR)
            added_NRK = _dot(weight_NRS.astype(v_NSK.dtype), _block_of(v_NSK, place, block))
            return higher_NR, sum_NR * shrunk_NR + weight_NRS.sum(-1), out_NRK * shrunk_NR[..., None] + added_NRK

        zero_NR, zero_NRK = jnp.zeros(q_NRK.shape[:2]), jnp.zeros(q_NRK.shape)
        top_NR, sum_NR, out_NRK = lax.fori_loop(first[number], last[number], meet, (zero_NR + NEVER, zero_NR, zero_NRK))
        share_NR = jnp.where(sum_NR > 0, 1 / jnp.where(sum_NR > 0, sum_NR, 1.0), 0.0)  # padding sees nothing
        return (out_NRK * share_NR[..., None]).astype(q_NRK.dtype), top_NR, share_NR

    out, *of_softmax = lax.map(of_chunk, jnp.arange(len(first)))
    return _joined(out, q_NGTK.shape), *(_joined(x, q_NGTK.shape[:3]) for x in of_softmax)


def _backward_row(
    q_NGTK, k_NSK, v_NSK, marks: Marks, out_NGTK, top_NGT, share_NGT, d_out_NGTK, chunk: int, block: int, causal: bool
):
    """Returns the gradients of q_NGTK, k_NSK and v_NSK.

    Scores stand here with keys as rows and queries as columns: then no product needs a transposed copy of them.
    """
    first, last = visited(marks.ids_T, chunk, block, causal)
    k_NKS = jnp.swapaxes(k_NSK, 1, 2)

    def of_chunk(keys, number):
        q_NRK, out_NRK, d_out_NRK = (_chunk_of(x, number, chunk) for x in (q_NGTK, out_NGTK, d_out_NGTK))
        q_NKR, out_NKR, d_out_NKR = (jnp.swapaxes(x, 1, 2) for x in (q_NRK, out_NRK, d_out_NRK))
        top_N1R, share_N1R = (_chunk_of(x[..., None], number, chunk).swapaxes(1, 2) for x in (top_NGT, share_NGT))
        mean_N1R = jnp.sum(d_out_NKR.astype(jnp.float32) * out_NKR.astype(jnp.float32), axis=1, keepdims=True)

        def meet(place, gradients):
            d_q_NKR, d_k_NSK, d_v_NSK = gradients
            seen_SR = _seen(marks, number, chunk, place, block, causal, q_NGTK.shape[1]).T
            score_NSR = _dot(_block_of(k_NSK, place, block), q_NKR)
            weight_NSR = jnp.where(seen_SR, jnp.exp(score_NSR - top_N1R) * share_N1R, 0.0)
            d_weight_NSR = _dot(_block_of(v_NSK, place, block), d_out_NKR)
            d_score_NSR = (weight_NSR * (d_weight_NSR - mean_N1R)).astype(q_NRK.dtype)
            d_k_NSK = _add_block(d_k_NSK, place, _dot(d_score_NSR, q_NRK))
            d_v_NSK = _add_block(d_v_NSK, place, _dot(weight_NSR.astype(q_NRK.dtype), d_out_NRK))
            return d_q_NKR + _dot(_block_of(k_NKS, place, block, axis=2), d_score_NSR), d_k_NSK, d_v_NSK

        d_q_NKR, *keys = lax.fori_loop(first[number], last[number], meet, (jnp.zeros(q_NKR.shape), *keys))
        return tuple(keys), jnp.swapaxes(d_q_NKR, 1, 2).astype(q_NRK.dtype)

    zeros = jnp.zeros(k_NSK.shape), jnp.zeros(v_NSK.shape)
    (d_k_NSK, d_v_NSK), d_q = lax.scan(of_chunk, zeros, jnp.arange(len(first)))
    return _joined(d_q, q_NGTK.shape), d_k_NSK.astype(k_NSK.dtype), d_v_NSK.astype(v_NSK.dtype)


def visited(ids_T: jax.Array, chunk: int, block: int, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Returns the first block of keys that each chunk of queries visits, and the one after its last.

    Every key that a query of the chunk sees lies between them, in whatever order ids come.
    """
    ids_CQ, place_T = ids_T.reshape(-1, chunk), jnp.arange(len(ids_T))
    least_C, most_C = jnp.where(ids_CQ > 0, ids_CQ, jnp.iinfo(ids_T.dtype).max).min(1), ids_CQ.max(1)
    inside_CT = (ids_T >= least_C[:, None]) & (ids_T <= most_C[:, None])
    first_C = jnp.where(inside_CT, place_T, len(ids_T)).min(1) // block
    last_C = -(-jnp.where(inside_CT, place_T + 1, 0).max(1) // block)
    if causal:
        last_C = jnp.minimum(last_C, -(-chunk * jnp.arange(1, len(ids_CQ) + 1) // block))
    return first_C, last_C


def _seen(marks: Marks, number, chunk: int, place, block: int, causal: bool, group: int) -> jax.Array:
    """Returns mask_RS of a chunk of queries, `group` times over, and a block of keys."""
    ids_Q, branch_Q = (lax.dynamic_slice_in_dim(x, number * chunk, chunk)[:, None] for x in marks)
    ids_S, branch_S = (lax.dynamic_slice_in_dim(x, place * block, block) for x in marks)
    seen_QS = (ids_Q == ids_S) & (ids_Q > 0) & ((branch_S == 0) | (branch_S == branch_Q))
    if causal:
        seen_QS &= (number * chunk + jnp.arange(chunk))[:, None] >= place * block + jnp.arange(block)
    return jnp.tile(seen_QS, (group, 1))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the matrix product for each head, summed in float32."""
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _chunk_of(x_NGTK: jax.Array, number, chunk: int) -> jax.Array:
    """Returns x_NRK: the queries that share a key head stand one group after another."""
    part = lax.dynamic_slice_in_dim(x_NGTK, number * chunk, chunk, axis=2)
    return part.reshape(part.shape[0], -1, part.shape[-1])


def _joined(chunks, shape: tuple[int, ...]) -> jax.Array:
    """Returns the array of this shape, [N, G, T, …], whose chunks [C, N, R, …] these are."""
    parts = chunks.reshape(len(chunks), *shape[:2], -1, *shape[3:])
    return jnp.moveaxis(parts, 0, 2).reshape(shape)


def _block_of(x_NSK: jax.Array, place, block: int, axis: int = 1) -> jax.Array:
    return lax.dynamic_slice_in_dim(x_NSK, place * block, block, axis)


def _add_block(total_NSK: jax.Array, place, part_NSK: jax.Array) -> jax.Array:
    size = part_NSK.shape[1]
    return lax.dynamic_update_slice_in_dim(
        total_NSK, _block_of(total_NSK, place, size) + part_NSK, place * size, axis=1
    )
