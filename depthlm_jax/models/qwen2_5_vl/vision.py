"""The vision tower: patches in window-major order → merged patches of the decoder's width.

Every window owns `window_patches` slots, those beyond an image's edge are padding (image id 0). So window attention is
a dense batch of small matrices, full attention is masked by image id, and no gather stands between the layers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from depthlm_jax.models.layers import (
    GatedMlp,
    RMSNorm,
    Turn,
    attention,
    rope_frequencies,
    rope_turn,
    rotate,
    same_segment,
    scan_layers,
    stack,
)
from depthlm_jax.models.qwen2_5_vl.config import Qwen25VLConfig, Vision

NORM_EPS = 1e-6  # Source: HF Qwen2_5_VLVisionBlock, a constant there too
ROPE_THETA = 10000.0


class FusedProjection(nnx.Module):
    """Linear to queries, keys and values at once; kernel_D3H keeps them apart so that heads can be sharded."""

    def __init__(self, width: int, rngs: nnx.Rngs, init: Callable):
        self.kernel = nnx.Param(init(rngs.params(), (width, 3, width)))
        self.bias = nnx.Param(jnp.zeros((3, width)))

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        return jnp.einsum("bpd,dch->bpch", x_BPD, self.kernel[...]) + self.bias[...]


class VisionAttention(nnx.Module):
    def __init__(self, config: Vision, rngs: nnx.Rngs, init: Callable, linear: Callable):
        self.qkv = FusedProjection(config.hidden_size, rngs, init)
        self.proj = linear(config.hidden_size, config.hidden_size, use_bias=True)
        self.heads = config.num_heads

    def __call__(self, x_BPD: jax.Array, turn: Turn, image_id_BP: jax.Array, window: int) -> jax.Array:
        """`window`: slots that see each other, the whole row for full attention."""
        rows, slots, width = x_BPD.shape
        q, k, v = jnp.moveaxis(self.qkv(x_BPD).reshape(rows, slots, 3, self.heads, width // self.heads), 2, 0)
        q, k = rotate(q, turn), rotate(k, turn)
        q, k, v, ids = (a.reshape(rows * slots // window, window, *a.shape[2:]) for a in (q, k, v, image_id_BP))
        return self.proj(attention(q, k, v, same_segment(ids, ids)).reshape(rows, slots, width))


class VisionBlock(nnx.Module):
    def __init__(self, config: Vision, rngs: nnx.Rngs, init: Callable, linear: Callable):
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config, rngs, init, linear)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, use_bias=True, linear=linear)

    def __call__(self, x_BPD: jax.Array, turn: Turn, image_id_BP: jax.Array, window: int) -> jax.Array:
        x_BPD = x_BPD + self.attn(self.norm1(x_BPD), turn, image_id_BP, window)
        return x_BPD + self.mlp(self.norm2(x_BPD))


class PatchEmbed(nnx.Module):
    """Conv3d over (frame, patch) as a matrix; an image is the same frame twice, so the frames' kernels are added."""

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs, init: Callable):
        shape = (config.vision.temporal_patch_size, config.channels, config.vision.hidden_size)
        self.kernel = nnx.Param(init(rngs.params(), shape))

    def __call__(self, pixels_BPC: jax.Array) -> jax.Array:
        return pixels_BPC @ self.kernel[...].sum(0)


class PatchMerger(nnx.Module):
    def __init__(self, config: Vision, linear: Callable):
        merged = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, NORM_EPS)
        self.mlp_0 = linear(merged, merged, use_bias=True)
        self.mlp_2 = linear(merged, config.out_hidden_size, use_bias=True)
        self.width = merged

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        merged_BMD = self.ln_q(x_BPD).reshape(x_BPD.shape[0], -1, self.width)
        return self.mlp_2(jax.nn.gelu(self.mlp_0(merged_BMD), approximate=False))


class VisionTower(nnx.Module):
    """Source: HF Qwen2_5_VisionTransformerPretrainedModel."""

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs, make_linear: Callable, constrain: Callable, remat: bool):
        vision = config.vision
        init = nnx.initializers.normal(config.initializer_range)
        self.patch_embed = nnx.Dict(proj=PatchEmbed(config, rngs, init))
        self.blocks = stack(lambda r: VisionBlock(vision, r, init, make_linear(r)), vision.depth, rngs)
        self.merger = PatchMerger(vision, make_linear(rngs))
        self.config, self.constrain, self.remat = config, constrain, remat

    def __call__(self, patches_BPC: jax.Array, patch_rc_BP2: jax.Array, image_id_BP: jax.Array) -> jax.Array:
        """Returns merged_BMD, in the order of the patch slots.

        Args:
          patches_BPC: uint8, one channel plane after another, as HF flattens a frame of a patch.
          patch_rc_BP2: row and column of the patch in its image.
          image_id_BP: from 1; 0 = padding.
        """
        dtype = self.merger.mlp_0.kernel[...].dtype
        hidden_BPD = self.patch_embed["proj"](self.normalise(patches_BPC).astype(dtype))
        turn = self.turn(patch_rc_BP2)
        full = self.config.vision.fullatt_block_indexes
        window, slots = self.config.vision.window_patches, patches_BPC.shape[1]

        def step(block: VisionBlock, hidden_BPD: jax.Array, is_full: bool, _):
            hidden_BPD = block(hidden_BPD, turn, image_id_BP, slots if is_full else window)
            return self.constrain(hidden_BPD, "BPD"), None

        kinds = [layer in full for layer in range(self.config.vision.depth)]
        hidden_BPD, _ = scan_layers(self.blocks, step, hidden_BPD, kinds, remat=self.remat)
        return self.constrain(self.merger(hidden_BPD), "BMD")

    def normalise(self, patches_BPC: jax.Array) -> jax.Array:
        """Returns (value / 255 − mean) / std of each colour, float32."""
        mean_C, std_C = (
            np.repeat(np.float32(values), self.config.vision.patch_size**2)
            for values in (self.config.image_mean, self.config.image_std)
        )
        return (patches_BPC.astype(jnp.float32) / 255 - mean_C) / std_C

    def turn(self, patch_rc_BP2: jax.Array) -> Turn:
        """Returns the rotation of each patch: row in the first half of the pairs, column in the second."""
        head_width = self.config.vision.hidden_size // self.config.vision.num_heads
        frequencies = rope_frequencies(head_width // 2, ROPE_THETA)
        return rope_turn((patch_rc_BP2[..., None] * frequencies).reshape(*patch_rc_BP2.shape[:2], -1))
