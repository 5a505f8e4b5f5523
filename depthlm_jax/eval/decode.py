"""Batched greedy decoding with a cache of fixed size."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from depthlm_jax import tree
from depthlm_jax.models.registry import Network


def make_greedy(network: Network, compute_dtype, max_new_tokens: int, stop_tokens: Sequence[int]) -> Callable:
    """Returns greedy(parameters, batch) → tokens_BG: what follows each row's last supervised position.

    Rows are prompts, padded on the right. Prompt keys fill the first T slots of the cache, decoded ones the slots
    after, so every row writes to the same slot. Decoding ends when every row has said a stop token; after its own, a
    row repeats it.

    Args:
      network: prefill and decode_one.
      compute_dtype: of the parameters during decoding.
      max_new_tokens: G.
      stop_tokens: ids that end an answer.
    """
    stops = jnp.asarray(stop_tokens)

    def greedy(parameters: dict, batch: dict[str, jax.Array]) -> jax.Array:
        parameters = tree.cast(parameters, compute_dtype)
        logits_BAV, cache = network.prefill(parameters, batch, max_new_tokens)
        first_B = logits_BAV[:, 0].argmax(-1)
        rows, length = batch["tokens_BT"].shape
        prompt_BT = batch["segments_BT"] > 0
        next_position_B = batch["positions_BTZ"].max((1, 2)) + 1
        slots_S = jnp.arange(length + max_new_tokens)
        prompt_BS = jnp.pad(prompt_BT, ((0, 0), (0, max_new_tokens)))
        tokens_BG = jnp.full((rows, max_new_tokens), stops[0]).at[:, 0].set(first_B)

        def unfinished(carry) -> jax.Array:
            n, _, ended_B, _, _ = carry
            return (n < max_new_tokens) & ~ended_B.all()

        def decode(carry):
            n, last_B, ended_B, tokens_BG, cache = carry
            slot = length + n - 1
            seen_BS = prompt_BS | ((slots_S >= length) & (slots_S <= slot))
            position_B1 = (next_position_B + n - 1)[:, None]
            logits_B1V, cache = network.decode_one(
                parameters, last_B[:, None], position_B1, slot, seen_BS[:, None], cache
            )
            token_B = jnp.where(ended_B, last_B, logits_B1V[:, 0].argmax(-1))
            return n + 1, token_B, ended_B | jnp.isin(token_B, stops), tokens_BG.at[:, n].set(token_B), cache

        carry = (1, first_B, jnp.isin(first_B, stops), tokens_BG, cache)
        return jax.lax.while_loop(unfinished, decode, carry)[3]

    return jax.jit(greedy)


def cut(tokens_G: np.ndarray, stop_tokens: Sequence[int]) -> list[int]:
    """Returns the tokens up to and with the first stop token."""
    ends = np.flatnonzero(np.isin(tokens_G, stop_tokens))
    return tokens_G[: ends[0] + 1 if len(ends) else None].tolist()
