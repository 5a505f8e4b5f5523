"""Qwen2.5-VL: vision tower, decoder with M-RoPE."""

import jax
import numpy as np
from flax import nnx

from depthlm_jax.models.decoder import Decoder
from depthlm_jax.models.execution import Execution
from depthlm_jax.models.layers import Linear, Turn, linear_of, rope_frequencies, rope_turn
from depthlm_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from depthlm_jax.models.qwen2_5_vl.vision import VisionTower
from depthlm_jax.models.vision_language import VisionLanguage


class Qwen25VL(VisionLanguage):
    """Source: HF Qwen2_5_VLForConditionalGeneration, hub layout."""

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs, how: Execution):
        sizes = config.decoder
        self.visual = VisionTower(config, rngs, how)
        self.model = Decoder(sizes, rngs)
        if not config.tie_word_embeddings:
            linear = linear_of(sizes.initializer_range, rngs)
            self.lm_head = linear(sizes.hidden_size, sizes.vocab_size, use_bias=False)
        self.config, self.how = config, how

    def decoder(self) -> Decoder:
        return self.model

    def untied_head(self) -> Linear | None:
        return None if self.config.tie_word_embeddings else self.lm_head

    def see(self, patches_BPC: jax.Array, patch_rc_BP2: jax.Array, image_id_BP: jax.Array) -> jax.Array:
        return self.visual(patches_BPC, patch_rc_BP2, image_id_BP)

    def turn(self, positions_BTZ: jax.Array) -> Turn:
        """Returns the M-RoPE rotation: consecutive sections of the frequencies turn with t, with h and with w."""
        section = self.config.mrope_section
        axis_k = np.repeat(np.arange(len(section)) % 3, section)
        return rope_turn(
            positions_BTZ[..., axis_k] * rope_frequencies(self.config.decoder.head_width, self.config.rope_theta)
        )
