"""The vision tower: patches of any number of images in raster order → what the decoder sees of each."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from depthlm_jax.models.attention import Among
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
from depthlm_jax.models.pixtral.config import PixtralConfig, Vision

NORM_EPS = 1e-5  # Source: HF PixtralAttentionLayer, a constant there too


class VisionAttention(nnx.Module):
    """Source: HF PixtralAttention."""

    def __init__(self, sizes: Vision, linear: Callable):
        width = sizes.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(width, width, use_bias=False) for _ in range(4))
        self.heads = sizes.num_attention_heads

    def __call__(self, x_BPD: jax.Array, turn: Turn, attend: Attend) -> jax.Array:
        q, k, v = (
            project(x_BPD).reshape(*x_BPD.shape[:2], self.heads, -1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(rotate(q, turn), rotate(k, turn), v).reshape(x_BPD.shape))


class VisionBlock(nnx.Module):
    """Source: HF PixtralAttentionLayer."""

    def __init__(self, sizes: Vision, linear: Callable):
        self.attention_norm = RMSNorm(sizes.hidden_size, NORM_EPS)
        self.ffn_norm = RMSNorm(sizes.hidden_size, NORM_EPS)
        self.attention = VisionAttention(sizes, linear)
        self.feed_forward = GatedMlp(sizes.hidden_size, sizes.intermediate_size, use_bias=False, linear=linear)

    def __call__(self, x_BPD: jax.Array, turn: Turn, attend: Attend) -> jax.Array:
        x_BPD = x_BPD + self.attention(self.attention_norm(x_BPD), turn, attend)
        return x_BPD + self.feed_forward(self.ffn_norm(x_BPD))


class PatchEmbed(nnx.Module):
    """Conv2d over a patch as a matrix."""

    def __init__(self, config: PixtralConfig, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.vision.initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), (config.channels, config.vision.hidden_size)))

    def __call__(self, pixels_BPC: jax.Array) -> jax.Array:
        return pixels_BPC @ self.kernel[...]


class VisionTower(nnx.Module):
    """Source: HF PixtralVisionModel."""

    def __init__(self, config: PixtralConfig, rngs: nnx.Rngs, how: Execution):
        sizes, spread = config.vision, config.vision.initializer_range
        self.patch_conv = PatchEmbed(config, rngs)
        self.ln_pre = RMSNorm(sizes.hidden_size, NORM_EPS)
        blocks = stack(lambda r: VisionBlock(sizes, linear_of(spread, r)), sizes.num_hidden_layers, rngs)
        self.transformer = nnx.Dict(layers=blocks)
        self.config, self.how = config, how

    def __call__(self, patches_BPC: jax.Array, patch_rc_BP2: jax.Array, image_id_BP: jax.Array) -> jax.Array:
        """Returns hidden_BPD; arguments as of VisionLanguage.see."""
        config = self.config
        pixels_BPC = normalised(patches_BPC, config.rescale_factor, config.image_mean, config.image_std)
        hidden_BPD = self.ln_pre(self.patch_conv(pixels_BPC.astype(self.patch_conv.kernel[...].dtype)))
        turn = self.turn(patch_rc_BP2)

        def attend(q_BPNK, k_BPNK, v_BPNK):
            return self.how.attend(q_BPNK, k_BPNK, v_BPNK, Among(image_id_BP))

        def step(block: VisionBlock, hidden_BPD: jax.Array, *_):
            return self.how.constrain(block(hidden_BPD, turn, attend), "BPD"), None

        how = self.how
        return scan_layers(self.transformer["layers"], step, hidden_BPD, remat=how.remat, unroll=how.unroll)[0]

    def turn(self, patch_rc_BP2: jax.Array) -> Turn:
        """Returns the rotation of each patch: rows turn with the even frequencies, columns with the odd ones."""
        sizes = self.config.vision
        frequencies = rope_frequencies(sizes.hidden_size // sizes.num_attention_heads, sizes.rope_theta)
        row_BP, column_BP = jnp.moveaxis(patch_rc_BP2[..., None], -2, 0)
        return rope_turn(jnp.concatenate([row_BP * frequencies[0::2], column_BP * frequencies[1::2]], axis=-1))
