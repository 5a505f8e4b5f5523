"""Pixtral: vision tower, projector, Mistral decoder."""

import jax
from flax import nnx

from depthlm_jax.models.decoder import Decoder
from depthlm_jax.models.execution import Execution
from depthlm_jax.models.layers import Linear, Turn, linear_of, rope_frequencies, rope_turn
from depthlm_jax.models.pixtral.config import PixtralConfig
from depthlm_jax.models.pixtral.vision import VisionTower
from depthlm_jax.models.vision_language import VisionLanguage


class Projector(nnx.Module):
    """Source: HF LlavaMultiModalProjector."""

    def __init__(self, config: PixtralConfig, rngs: nnx.Rngs):
        linear, width = linear_of(config.decoder.initializer_range, rngs), config.decoder.hidden_size
        self.linear_1 = linear(config.vision.hidden_size, width, use_bias=True)
        self.linear_2 = linear(width, width, use_bias=True)

    def __call__(self, x_BPD: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(x_BPD), approximate=False))


class Pixtral(VisionLanguage):
    """Source: HF LlavaForConditionalGeneration with PixtralVisionModel and MistralForCausalLM, hub layout."""

    def __init__(self, config: PixtralConfig, rngs: nnx.Rngs, how: Execution):
        sizes = config.decoder
        head = linear_of(sizes.initializer_range, rngs)(sizes.hidden_size, sizes.vocab_size, use_bias=False)
        self.vision_tower = VisionTower(config, rngs, how)
        self.multi_modal_projector = Projector(config, rngs)
        self.language_model = nnx.Dict(model=Decoder(sizes, rngs), lm_head=head)
        self.config, self.how = config, how

    def decoder(self) -> Decoder:
        return self.language_model["model"]

    def untied_head(self) -> Linear:
        return self.language_model["lm_head"]

    def see(self, patches_BPC: jax.Array, patch_rc_BP2: jax.Array, image_id_BP: jax.Array) -> jax.Array:
        hidden_BPD = self.vision_tower(patches_BPC, patch_rc_BP2, image_id_BP)
        return self.how.constrain(self.multi_modal_projector(hidden_BPD), "BMD")

    def turn(self, positions_BTZ: jax.Array) -> Turn:
        """Positions are the same on all axes."""
        frequencies = rope_frequencies(self.config.decoder.head_width, self.config.rope_theta)
        return rope_turn(positions_BTZ[..., :1] * frequencies)
