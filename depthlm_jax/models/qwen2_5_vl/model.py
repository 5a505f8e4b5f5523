"""Qwen2.5-VL: the decoder, and the whole model over a packed batch."""

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
from depthlm_jax.models.qwen2_5_vl.config import Qwen25VLConfig
from depthlm_jax.models.qwen2_5_vl.vision import VisionTower

Cache = tuple[jax.Array, jax.Array]  # keys and values, [L, B, S, N, K]


class DecoderAttention(nnx.Module):
    """Grouped-query attention with biased projections."""

    def __init__(self, config: Qwen25VLConfig, linear: Callable):
        key_width = config.num_key_value_heads * config.head_width
        self.q_proj = linear(config.hidden_size, config.hidden_size, use_bias=True)
        self.k_proj = linear(config.hidden_size, key_width, use_bias=True)
        self.v_proj = linear(config.hidden_size, key_width, use_bias=True)
        self.o_proj = linear(config.hidden_size, config.hidden_size, use_bias=False)
        self.head_width = config.head_width

    def __call__(self, x_BTD, turn: Turn, mask_BTS, cache: Cache | None, slot) -> tuple[jax.Array, Cache]:
        """With a cache, its slots from `slot` on are replaced by this call's keys and values before attending."""
        q, k, v = (
            project(x_BTD).reshape(*x_BTD.shape[:2], -1, self.head_width)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            k, v = (
                jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)
                for old, new in zip(cache, (k, v), strict=True)
            )
        return self.o_proj(attention(q, k, v, mask_BTS).reshape(x_BTD.shape)), (k, v)


class DecoderLayer(nnx.Module):
    def __init__(self, config: Qwen25VLConfig, linear: Callable):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, linear)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, use_bias=False, linear=linear)

    def __call__(self, x_BTD, turn: Turn, mask_BTS, cache: Cache | None = None, slot=0) -> tuple[jax.Array, Cache]:
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), turn, mask_BTS, cache, slot)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


class Decoder(nnx.Module):
    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs, make_linear: Callable):
        init = nnx.initializers.normal(config.initializer_range)
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs)
        self.layers = stack(lambda r: DecoderLayer(config, make_linear(r)), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen25VL(nnx.Module):
    """Source: HF Qwen2_5_VLForConditionalGeneration, hub layout."""

    def __init__(self, config: Qwen25VLConfig, rngs: nnx.Rngs, constrain: Callable, remat: bool):
        init = nnx.initializers.normal(config.initializer_range)

        def make_linear(r: nnx.Rngs) -> Callable:
            return lambda width_in, width_out, use_bias: nnx.Linear(
                width_in, width_out, use_bias=use_bias, kernel_init=init, rngs=r
            )

        self.visual = VisionTower(config, rngs, make_linear, constrain, remat)
        self.model = Decoder(config, rngs, make_linear)
        if not config.tie_word_embeddings:
            self.lm_head = make_linear(rngs)(config.hidden_size, config.vocab_size, use_bias=False)
        self.config, self.constrain, self.remat = config, constrain, remat

    def logits(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns logits_BAV, float32: at each answer slot, of the token after it."""
        hidden_BTD, _ = self.decode_all(batch, keep_cache=False)
        return self.answer_logits(hidden_BTD, batch)

    def prefill(self, batch: dict[str, jax.Array], new_slots: int) -> tuple[jax.Array, Cache]:
        """Returns logits_BAV, and the cache with `new_slots` free slots after the T of the prompt."""
        hidden_BTD, cache = self.decode_all(batch, keep_cache=True)
        cache = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, new_slots), (0, 0), (0, 0))), cache)
        return self.answer_logits(hidden_BTD, batch), cache

    def decode_one(self, tokens_BQ, positions_BQ, slot, seen_BQS, cache: Cache) -> tuple[jax.Array, Cache]:
        """Returns logits_BQV of the token after each of `tokens_BQ`, and the cache with Q slots filled from `slot` on.

        Args:
          tokens_BQ: the tokens decoded last; Q = 1, or as many as continue a prompt side by side.
          positions_BQ: their positions, the same on all three M-RoPE axes.
          slot: first of the Q cache slots that they take, a scalar for all rows.
          seen_BQS: cache slots that each attends to, its own included.
          cache: of `prefill`, or of the call before.
        """
        turn = self.turn(jnp.repeat(positions_BQ[..., None], 3, axis=-1))

        def step(layer: DecoderLayer, hidden_BQD, _, layer_cache: Cache):
            return layer(hidden_BQD, turn, seen_BQS, layer_cache, slot)

        hidden_BQD = self.model.embed_tokens(tokens_BQ)
        hidden_BQD, cache = scan_layers(self.model.layers, step, hidden_BQD, per_layer=cache, remat=False)
        return self.head(self.model.norm(hidden_BQD)), cache

    def decode_all(self, batch: dict[str, jax.Array], keep_cache: bool) -> tuple[jax.Array, Cache | None]:
        """Returns hidden_BTD after the last norm, and every layer's keys and values if asked for."""
        turn = self.turn(batch["positions_BTZ"])
        mask_BTS = causal_mask(batch["segments_BT"], batch["branch_BT"])

        def step(layer: DecoderLayer, hidden_BTD, *_):
            hidden_BTD, cache = layer(hidden_BTD, turn, mask_BTS)
            return self.constrain(hidden_BTD, "BTD"), cache if keep_cache else None

        hidden_BTD = self.constrain(self.embed(batch), "BTD")
        hidden_BTD, cache = scan_layers(self.model.layers, step, hidden_BTD, remat=self.remat and not keep_cache)
        return self.model.norm(hidden_BTD), cache

    def embed(self, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns token embeddings, with the row's merged patches where `vision_index_BT` names one."""
        merged_BMD = self.visual(batch["patches_BPC"], batch["patch_rc_BP2"], batch["image_id_BP"])
        index_BT1 = batch["vision_index_BT"][..., None]
        seen_BTD = jnp.take_along_axis(merged_BMD, jnp.maximum(index_BT1, 0), axis=1)
        return jnp.where(index_BT1 >= 0, seen_BTD, self.model.embed_tokens(batch["tokens_BT"]))

    def turn(self, positions_BTZ: jax.Array) -> Turn:
        """Returns the M-RoPE rotation: consecutive sections of the frequencies turn with t, with h and with w."""
        axis_k = np.repeat(np.arange(len(self.config.mrope_section)) % 3, self.config.mrope_section)
        return rope_turn(positions_BTZ[..., axis_k] * rope_frequencies(self.config.head_width, self.config.rope_theta))

    def answer_logits(self, hidden_BTD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        """Returns logits_BAV; the vocabulary is multiplied with answer slots only."""
        return self.head(jnp.take_along_axis(hidden_BTD, batch["answer_index_BA"][..., None], axis=1))

    def head(self, hidden_BAD: jax.Array) -> jax.Array:
        """Returns logits_BAV, summed in float32 whatever the dtype of the factors."""
        tied = self.config.tie_word_embeddings
        kernel_DV = self.model.embed_tokens.embedding[...].T if tied else self.lm_head.kernel[...]
        logits_BAV = jnp.einsum("bad,dv->bav", hidden_BAD, kernel_DV, preferred_element_type=jnp.float32)
        return self.constrain(logits_BAV, "BAV")


def causal_mask(segments_BT: jax.Array, branch_BT: jax.Array) -> jax.Array:
    """Returns mask_BTS: a token sees itself and what stands before it in its own sample, but not other questions."""
    length = segments_BT.shape[1]
    shared_BTS = same_segment(branch_BT, branch_BT) | (branch_BT == 0)[:, None, :]
    return same_segment(segments_BT, segments_BT) & shared_BTS & np.tri(length, dtype=bool)
