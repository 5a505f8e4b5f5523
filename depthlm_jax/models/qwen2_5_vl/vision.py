"""The vision tower: patches in window-major order → merged patches of the decoder's width.

Every window owns `window_patches` slots, those beyond an image's edge are padding (image id 0). So window attention is
a dense batch of small matrices, full attention is masked by image id, and no gather stands between the layers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from depthlm_jax.models.attention import Among, masked
from depthlm_jax.models.decoder import Attend
from depthlm_jax.models.execution import Execution
from depthlm_jax.models.layers import (
    GatedMlp,
    RMSNorm,
    Turn,
    linear_of,
    normalised,
    rope_frequencies,
    rope_turn,
    rotate,
    scan_layers,
    stack,
)
from depthlm_jax.models.qwen2_5_vl.config import ROPE_THETA, Qwen25VLConfig, Vision

NORM_EPS = 1e-6  # Source: HF Qwen2_5_VLVisionBlock, a constant there too


class VisionAttention(nnx.Module):
    """The kernel_D3H keeps queries, keys and values apart, so that heads can be sharded."""

    def __init__(self, config: Vision, linear: Callable):
        self.qkv = linear(config.hidden_size, (3, config.hidden_size), use_bias=True)
        self.proj = linear(config.hidden_size, config.hidden_size, use_bias=True)
        self.heads = config.num_heads

    def __call__(self, x_BPD: jax.Array, turn: Turn, attend: Attend) -> jax.Array:
        rows, slots, width = x_BPD.shape
        q, k, v = jnp.moveaxis(self.qkv(x_BPD).reshape(rows, slots, 3, self.heads, width // self.heads), 2, 0)
        return self.proj(attend(rotate(q, turn), rotate(k, turn), v).reshape(rows, slots, width))


class VisionBlock(nnx.Module):
    def __init__(self, config: Vision, linear: Callable):
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS)
        self.attn = VisionAttention(config, linear)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, use_bias=True, linear=linear)

    def __call__(self, x_BPD: jax.Array, turn: Turn, attend: Attend) -> jax.Array:
        x_BPD = x_BPD + self.attn(self.norm1(x_BPD), turn, attend)
        return x_BPD + self.mlp(self.norm2(x_BPD))


class PatchEmbed(nnx.Module):
    """Conv3d over (frame, patch) as a matrix; an image is the same frame twice, so the frames' kernels are added."""

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs, init: Callable):
        shape = (config.vision.temporal_patch_size, config.channels, config.vision.hidden_size)
        self.kernel = nnx.Param(init(rngs.params(), shape))

    def __call__(self, pixels_BPC: jax.Array) -> jax.Array:
        return jnp.einsum("...c,fcd->...d", pixels_BPC, self.kernel[...])  # their sum in bfloat16 would be rounded


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

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs, how: Execution):
        vision, spread = config.vision, config.decoder.initializer_range
        self.patch_embed = nnx.Dict(proj=PatchEmbed(config, rngs, nnx.initializers.normal(spread)))
        self.blocks = stack(lambda r: VisionBlock(vision, linear_of(spread, r)), vision.depth, rngs)
        self.merger = PatchMerger(vision, linear_of(spread, rngs))
        self.config, self.how = config, how

    def __call__(self, patches_BPC: jax.Array, patch_rc_BP2: jax.Array, image_id_BP: jax.Array) -> jax.Array:
        """Returns merged_BMD; see VisionLanguage.see."""
        dtype = self.merger.mlp_0.kernel[...].dtype
        pixels_BPC = normalised(patches_BPC, 1 / 255, self.config.image_mean, self.config.image_std)
        hidden_BPD = self.patch_embed["proj"](pixels_BPC.astype(dtype))
        turn, vision = self.turn(patch_rc_BP2), self.config.vision
        attend = {True: self.among_images(image_id_BP), False: self.among_windows(image_id_BP)}

        def step(block: VisionBlock, hidden_BPD: jax.Array, is_full: bool, _):
            return self.how.constrain(block(hidden_BPD, turn, attend[is_full]), "BPD"), None

        kinds = [layer in vision.fullatt_block_indexes for layer in range(vision.depth)]
        how = self.how
        hidden_BPD, _ = scan_layers(self.blocks, step, hidden_BPD, kinds, remat=how.remat, unroll=how.unroll)
        return self.how.constrain(self.merger(hidden_BPD), "BMD")

    def among_images(self, image_id_BP: jax.Array) -> Attend:
        """Returns full attention: a patch sees its image."""
        return lambda q, k, v: self.how.attend(q, k, v, Among(image_id_BP))

    def among_windows(self, image_id_BP: jax.Array) -> Attend:
        """Returns window attention: a dense batch of windows, no mask but padding."""

        def windows(a: jax.Array) -> jax.Array:
            return a.reshape(-1, self.config.vision.window_patches, *a.shape[2:])

        ids = windows(image_id_BP)
        seen = ids[:, :, None] == ids[:, None, :]
        return lambda q, k, v: masked(windows(q), windows(k), windows(v), seen).reshape(q.shape)

    def turn(self, patch_rc_BP2: jax.Array) -> Turn:
        """Returns the rotation of each patch: row in the first half of the pairs, column in the second."""
        head_width = self.config.vision.hidden_size // self.config.vision.num_heads
        frequencies = rope_frequencies(head_width // 2, ROPE_THETA)
        return rope_turn((patch_rc_BP2[..., None] * frequencies).reshape(*patch_rc_BP2.shape[:2], -1))
