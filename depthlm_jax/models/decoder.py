"""The language model that the families share: grouped-query attention, gated MLP, rotary positions."""

from collections.abc import Callable

import jax
from flax import nnx

from depthlm_jax.models.hf_config import DecoderSizes
from depthlm_jax.models.layers import GatedMlp, RMSNorm, Turn, linear_of, rotate, stack

Cache = tuple[jax.Array, jax.Array]  # keys and values, [L, B, S, N, K]
Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q_BTNK, k_BSNK, v_BSNK) → values attended to


class DecoderAttention(nnx.Module):
    """Source: HF Qwen2_5_VLAttention, MistralAttention."""

    def __init__(self, sizes: DecoderSizes, linear: Callable):
        width = sizes.num_attention_heads * sizes.head_width
        key_width = sizes.num_key_value_heads * sizes.head_width
        self.q_proj = linear(sizes.hidden_size, width, use_bias=sizes.attention_bias)
        self.k_proj = linear(sizes.hidden_size, key_width, use_bias=sizes.attention_bias)
        self.v_proj = linear(sizes.hidden_size, key_width, use_bias=sizes.attention_bias)
        self.o_proj = linear(width, sizes.hidden_size, use_bias=False)
        self.head_width = sizes.head_width

    def __call__(self, x_BTD: jax.Array, turn: Turn, attend: Attend, cache: Cache | None, slot) -> tuple:
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
        return self.o_proj(attend(q, k, v).reshape(*x_BTD.shape[:2], -1)), (k, v)


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, sizes: DecoderSizes, linear: Callable):
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = DecoderAttention(sizes, linear)
        self.mlp = GatedMlp(sizes.hidden_size, sizes.intermediate_size, use_bias=False, linear=linear)

    def __call__(self, x_BTD, turn: Turn, attend: Attend, cache: Cache | None = None, slot=0) -> tuple:
        """Returns hidden_BTD, and this layer's keys and values."""
        attended_BTD, cache = self.self_attn(self.input_layernorm(x_BTD), turn, attend, cache, slot)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache


class Decoder(nnx.Module):
    """Embedding, layers and last norm; the head belongs to whoever owns this."""

    def __init__(self, sizes: DecoderSizes, rngs: nnx.Rngs):
        init = nnx.initializers.normal(sizes.initializer_range)
        self.embed_tokens = nnx.Embed(sizes.vocab_size, sizes.hidden_size, embedding_init=init, rngs=rngs)
        depth, spread = sizes.num_hidden_layers, sizes.initializer_range
        self.layers = stack(lambda r: DecoderLayer(sizes, linear_of(spread, r)), depth, rngs)
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
