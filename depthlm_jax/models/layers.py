"""What the model families share."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from depthlm_jax.models.blockwise import ATTENDED


def as_matrix(x_D: jax.Array) -> jax.Array:
    """Returns x_RD: with one leading axis XLA copies nothing for gradients, and sums them fast, on a processor too."""
    return x_D.reshape(-1, x_D.shape[-1])


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, computed in float32. Source: Zhang & Sennrich 2019."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.eps = eps

    def __call__(self, x_D: jax.Array) -> jax.Array:
        x32_RD = as_matrix(x_D).astype(jnp.float32)
        normed_RD = x32_RD * jax.lax.rsqrt(jnp.mean(x32_RD * x32_RD, axis=-1, keepdims=True) + self.eps)
        return (normed_RD * self.scale[...].astype(jnp.float32)).astype(x_D.dtype).reshape(x_D.shape)


class Linear(nnx.Module):
    """x · kernel + bias, and where `lora.add` has put factors: + x · lora_a · lora_b · scale.

    The output may have several axes, such as (3, H) for queries, keys and values at once.
    """

    def __init__(self, width: int, out: int | tuple[int, ...], *, use_bias: bool, init: Callable, rngs: nnx.Rngs):
        shape = (width, *np.atleast_1d(out).tolist())
        self.kernel = nnx.Param(init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(shape[1:])) if use_bias else None
        self.lora_a = self.lora_b = nnx.data(None)
        self.lora_scale, self.out_axes = 1.0, len(shape) - 1

    def __call__(self, x_D: jax.Array, sum_dtype=None) -> jax.Array:
        """`sum_dtype`: of the sum of products and of the result; None: that of the factors."""
        product = functools.partial(jnp.tensordot, axes=1, preferred_element_type=sum_dtype)
        x_RD = as_matrix(x_D)
        y = product(x_RD, self.kernel[...])
        if self.lora_a is not None:
            y += product(jnp.tensordot(x_RD, self.lora_a[...], 1), self.lora_b[...]) * self.lora_scale
        y = y if self.bias is None else y + self.bias[...]
        return y.reshape(*x_D.shape[:-1], *y.shape[1:])


def linear_of(initializer_range: float, rngs: nnx.Rngs) -> Callable:
    """Returns Linear with normally distributed kernels."""
    return functools.partial(Linear, init=nnx.initializers.normal(initializer_range), rngs=rngs)


class GatedMlp(nnx.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, width: int, inner: int, *, use_bias: bool, linear: Callable):
        self.gate_proj = linear(width, inner, use_bias=use_bias)
        self.up_proj = linear(width, inner, use_bias=use_bias)
        self.down_proj = linear(inner, width, use_bias=use_bias)

    def __call__(self, x_D: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_D)) * self.up_proj(x_D))


def normalised(patches_BPC: jax.Array, factor: float, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns (value · factor − mean) / std of each colour, float32; C is one colour plane after another."""
    each = patches_BPC.shape[-1] // len(mean)
    mean_C, std_C = (np.repeat(np.float32(values), each) for values in (mean, std))
    return (patches_BPC.astype(jnp.float32) * np.float32(factor) - mean_C) / std_C


def rope_frequencies(width: int, theta: float) -> jax.Array:
    """Returns the width / 2 angular frequencies theta^(−2i / width), float32."""
    return 1.0 / theta ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)


Turn = tuple[jax.Array, jax.Array]  # cosine and sine of the rotary angles, [B, T, K / 2], float32


def rope_turn(angles_BTk: jax.Array) -> Turn:
    """Returns cosine and sine, once for all layers."""
    return jnp.cos(angles_BTk), jnp.sin(angles_BTk)


def rotate(x_BTNK: jax.Array, turn: Turn) -> jax.Array:
    """Returns x with its K / 2 pairs (i, i + K / 2) turned, computed in float32 (HF's rotate_half form)."""
    cos_BT1k, sin_BT1k = (part[:, :, None] for part in turn)
    low, high = jnp.split(x_BTNK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([low * cos_BT1k - high * sin_BT1k, high * cos_BT1k + low * sin_BT1k], axis=-1)
    return turned.astype(x_BTNK.dtype)


REMAT = {  # what is kept of a layer, by what is computed again; "none": everything is kept
    "full": jax.checkpoint_policies.nothing_saveable,
    "attended": jax.checkpoint_policies.save_only_these_names(ATTENDED),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENDED),
    ),
}


def scan_layers(
    layers: nnx.Module, step: Callable, carry, kinds: Sequence = (None,), *, per_layer=None, remat: str, unroll: int = 1
):
    """Returns (carry, outputs) of `step(layer, carry, kind, x) -> (carry, output)` over stacked layers.

    The layers are scanned by the shortest group in which `kinds` repeats; inside a group, each run of equal kinds is
    a scan of its own. So the program's size depends on the pattern, not on the depth.

    Args:
      layers: a module whose parameters carry a leading L axis.
      kinds: a static tag for each layer; length L, or 1 when all are alike.
      per_layer: a pytree with leading L axis whose slices are `x`, or None.
      remat: key of REMAT.
      unroll: layers in a turn of a loop.
    """
    graph, state = nnx.split(layers)
    depth = jax.tree.leaves(state)[0].shape[0]
    kinds = list(kinds) * (depth // len(kinds))
    period = next(p for p in range(1, depth + 1) if depth % p == 0 and kinds == kinds[:p] * (depth // p))
    runs = runs_of(kinds[:period])

    def run_layer(carry, x, kind):
        return step(nnx.merge(graph, x[0]), carry, kind, x[1])

    if remat != "none":
        run_layer = jax.checkpoint(run_layer, prevent_cse=False, static_argnums=2, policy=REMAT[remat])

    def run_group(carry, xs):
        outputs = []
        for kind, start, stop in runs:
            part = jax.tree.map(lambda a, start=start, stop=stop: a[start:stop], xs)
            turn = min(unroll, stop - start)
            carry, output = jax.lax.scan(lambda c, x, kind=kind: run_layer(c, x, kind), carry, part, unroll=turn)
            outputs.append(output)
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)

    grouped = jax.tree.map(lambda a: a.reshape(depth // period, period, *a.shape[1:]), (state, per_layer))
    carry, outputs = jax.lax.scan(run_group, carry, grouped, unroll=max(1, min(unroll, depth) // period))
    return carry, jax.tree.map(lambda a: a.reshape(depth, *a.shape[2:]), outputs)


def runs_of(kinds: Sequence) -> list[tuple[object, int, int]]:
    """Returns (kind, start, stop) of each run of equal neighbours: 'aab' → ('a', 0, 2), ('b', 2, 3)."""
    starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    return [(kinds[i], i, j) for i, j in zip(starts, [*starts[1:], len(kinds)], strict=True)]


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """Returns `depth` differently initialised modules as one, parameters stacked on a leading L axis."""
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(depth))
