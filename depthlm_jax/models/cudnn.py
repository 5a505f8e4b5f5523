"""cuDNN's attention over packed rows, each sample by itself: no mask is made, and no score that nobody sees.

cuDNN takes where samples begin and how long they are, so padding between the slots of a sample is moved to the end of
the row first. JAX has this behind no public name; where that is gone, `model.attention=cudnn` takes masks.

Measured on an H200 (jax 0.11.2) against masks of 1024 queries, three images in 19,072 slots: 2.1 ms instead of 16.2
forwards, 8.6 instead of 48.7 with gradients. A step of the 3B on three samples took 522 ms instead of 836.
"""

import jax
import jax.numpy as jnp

try:
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
except ImportError:
    dot_product_attention = None

CAPABILITY = 9.0  # Hopper
MOST = 64  # samples, or images, of a row: each costs a little, also where there is none


def attend(q_BTNK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array, ids_BT: jax.Array, causal: bool) -> jax.Array:
    """Returns out_BTNK; that of padding (id 0) is zero, and all is NaN in a row of more than MOST samples.

    Args:
      q_BTNK: queries, bfloat16.
      k_BTNK: keys, of fewer heads (GQA).
      v_BTNK: values.
      ids_BT: of samples or images, ascending but for padding.
      causal: no slot sees one after itself.
    """
    real_BT11 = (ids_BT > 0)[..., None, None]
    order_BT, place_BT = to_front(ids_BT > 0)
    lengths_BM, starts_BM = extents(ids_BT)
    q, k, v = (permute(jnp.where(real_BT11, x, 0), order_BT, place_BT) for x in (q_BTNK, k_BTNK, v_BTNK))
    out_BTNK = dot_product_attention(
        q, k, v, q_seqlen=lengths_BM, kv_seqlen=lengths_BM, q_offsets=starts_BM, kv_offsets=starts_BM,
        scale=q.shape[-1] ** -0.5, mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
    )  # fmt: skip
    fits_B111 = (ids_BT.max(axis=1) <= MOST)[:, None, None, None]
    out_BTNK = jnp.where(real_BT11, permute(out_BTNK, place_BT, order_BT), 0)  # cuDNN leaves padding as it finds it
    return jnp.where(fits_B111, out_BTNK, jnp.nan)


def to_front(real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns order_BT, the slots of each row, those that are real first, and place_BT, where each slot stands then."""
    before_BT, padding_BT = jnp.cumsum(real_BT, axis=1), jnp.cumsum(~real_BT, axis=1)
    place_BT = jnp.where(real_BT, before_BT - 1, before_BT[:, -1:] + padding_BT - 1)
    slots_BT = jnp.broadcast_to(jnp.arange(real_BT.shape[1]), place_BT.shape)
    order_BT = jax.vmap(lambda place_T, slots_T: jnp.zeros_like(slots_T).at[place_T].set(slots_T))(place_BT, slots_BT)
    return order_BT, place_BT


def extents(ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns lengths_BM and starts_BM (M one larger) of the samples once padding is at the end; −1: there is none."""
    counts_BM = (ids_BT[:, :, None] == jnp.arange(1, MOST + 1)).sum(axis=1, dtype=jnp.int32)
    starts_BM = jnp.cumsum(counts_BM, axis=1, dtype=jnp.int32) - counts_BM
    lengths_BM, starts_BM = (jnp.where(counts_BM > 0, x, -1) for x in (counts_BM, starts_BM))
    return lengths_BM, jnp.pad(starts_BM, ((0, 0), (0, 1)), constant_values=-1)


@jax.custom_vjp
def permute(x_BTNK: jax.Array, order_BT: jax.Array, place_BT: jax.Array) -> jax.Array:
    """Returns the slots of each row in this order; `place_BT` is the inverse, by which gradients come back."""
    return jax.vmap(lambda x_TNK, order_T: x_TNK[order_T])(x_BTNK, order_BT)


permute.defvjp(
    lambda x_BTNK, order_BT, place_BT: (permute(x_BTNK, order_BT, place_BT), (order_BT, place_BT)),
    lambda kept, d_BTNK: (permute(d_BTNK, kept[1], kept[0]), None, None),
)
