"""Batched decoding with a cache of fixed size: the most likely answer, and the expectation of a number.

Letters besides those of batch.py: G decoded token, Q beam (a number prefix), N child of a beam, S cache slot,
V vocabulary. Prompts are padded on the right; their keys fill the first T slots of the cache, decoded tokens the slots
after, the same in every row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from depthlm_jax import tree
from depthlm_jax.models.registry import Network

NUMBER_TOKENS = 8  # of the longest number in an expectation, point included: 99999.99
BEAMS = 16  # prefixes of a row that live on
NEGLIGIBLE = 1e-4  # probability of all living prefixes of a row below which they are not followed
POINT = 10  # beside the digits 0 to 9: a number's symbols


class Stops(NamedTuple):
    """An answer that ends with one of these tokens."""

    tokens: Sequence[int]

    def end(self, token_B: jax.Array, before_BG: jax.Array) -> jax.Array:
        """Returns whether the token ends the answer; `before_BG` holds the tokens before it, −1 where none is yet."""
        return jnp.isin(token_B, jnp.asarray(self.tokens))


class Numbers(NamedTuple):
    """An answer that is one number, digits and at most one point: the first token that is no part of it ends it."""

    digits: Sequence[int]  # tokens of 0 to 9
    point: int
    may_be_zero: bool

    def end(self, token_B: jax.Array, before_BG: jax.Array) -> jax.Array:
        first_point_B = (token_B == self.point) & (before_BG != self.point).all(axis=1)
        return ~(jnp.isin(token_B, jnp.asarray(self.digits)) | first_point_B)


class Decoded(NamedTuple):
    tokens_BG: jax.Array  # the most likely at each step; after its end, a row repeats its last one
    expected_B: jax.Array | None  # of the number that follows the prompt, nan where none was found; None: not asked for
    mass_B: jax.Array | None  # probability of the numbers that it is the mean of


class Prompt(NamedTuple):
    """Rows to be continued, in a cache."""

    logits_BV: jax.Array  # of the first new token
    seen_BS: jax.Array  # slots that hold the prompt
    next_position_B: jax.Array
    slot: int  # the first free one
    cache: object


class Beams(NamedTuple):
    """Number prefixes of one length."""

    log_p_BQ: jax.Array  # −inf: dead
    mantissa_BQ: jax.Array  # the digits as an integer
    decimals_BQ: jax.Array  # digits after the point; −1: no point yet
    has_digit_BQ: jax.Array
    token_BQ: jax.Array  # the last one
    seen_BQS: jax.Array  # slots of the prompt and of the prefix


def make_decoder(
    network: Network, compute_dtype, max_new_tokens: int, ends: Stops | Numbers, expectation: bool = False
) -> Callable:
    """Returns decode(parameters, batch) → Decoded: what follows each row's last supervised position.

    Args:
      network: prefill and decode_one.
      compute_dtype: of the parameters during decoding.
      max_new_tokens: G.
      ends: what an answer ends with. Decoding stops when every row has ended.
      expectation: also the mean of the numbers that may follow; needs Numbers.
    """
    new_slots = max(max_new_tokens, NUMBER_TOKENS * BEAMS) if expectation else max_new_tokens

    def decode(parameters: dict, batch: dict[str, jax.Array]) -> Decoded:
        parameters = tree.cast(parameters, compute_dtype)
        decode_one = functools.partial(network.decode_one, parameters)
        logits_BAV, cache = network.prefill(parameters, batch, new_slots)
        seen_BS = jnp.pad(batch["segments_BT"] > 0, ((0, 0), (0, new_slots)))
        next_position_B = batch["positions_BTZ"].max((1, 2)) + 1
        prompt = Prompt(logits_BAV[:, 0], seen_BS, next_position_B, batch["tokens_BT"].shape[1], cache)
        tokens_BG, cache = _follow(decode_one, prompt, max_new_tokens, ends)
        if not expectation:
            return Decoded(tokens_BG, None, None)
        return Decoded(tokens_BG, *_expect(decode_one, prompt._replace(cache=cache), ends))

    return jax.jit(decode)


def make_greedy(network: Network, compute_dtype, max_new_tokens: int, stop_tokens: Sequence[int]) -> Callable:
    """Returns greedy(parameters, batch) → tokens_BG of `make_decoder` for answers that end with a stop token."""
    decode = make_decoder(network, compute_dtype, max_new_tokens, Stops(stop_tokens))
    return lambda parameters, batch: decode(parameters, batch).tokens_BG


def cut(tokens_G: np.ndarray, stop_tokens: Sequence[int]) -> list[int]:
    """Returns the tokens up to and with the first stop token."""
    ends = np.flatnonzero(np.isin(tokens_G, stop_tokens))
    return tokens_G[: ends[0] + 1 if len(ends) else None].tolist()


def cut_number(tokens_G: np.ndarray, numbers: Numbers) -> tuple[list[int], bool]:
    """Returns the tokens of the number that begins here, and whether it ends here too."""
    is_point_G = tokens_G == numbers.point
    part_G = np.isin(tokens_G, numbers.digits) | (is_point_G & (is_point_G.cumsum() == 1))
    ends = np.flatnonzero(~part_G)
    return tokens_G[: ends[0] if len(ends) else None].tolist(), len(ends) > 0


def _follow(decode_one: Callable, prompt: Prompt, max_new_tokens: int, ends: Stops | Numbers) -> tuple:
    """Returns the greedy tokens_BG, and the cache, in which free slots have been written to."""
    rows, slots = prompt.seen_BS.shape
    slots_S = jnp.arange(slots)
    nothing_BG = jnp.full((rows, max_new_tokens), -1)
    first_B = prompt.logits_BV.argmax(-1)

    def unfinished(carry) -> jax.Array:
        n, _, ended_B, _, _ = carry
        return (n < max_new_tokens) & ~ended_B.all()

    def decode(carry):
        n, last_B, ended_B, tokens_BG, cache = carry
        slot = prompt.slot + n - 1
        seen_BS = prompt.seen_BS | ((slots_S >= prompt.slot) & (slots_S <= slot))
        position_B1 = (prompt.next_position_B + n - 1)[:, None]
        logits_B1V, cache = decode_one(last_B[:, None], position_B1, slot, seen_BS[:, None], cache)
        token_B = jnp.where(ended_B, last_B, logits_B1V[:, 0].argmax(-1))
        ended_B = ended_B | ends.end(token_B, tokens_BG)
        return n + 1, token_B, ended_B, tokens_BG.at[:, n].set(token_B), cache

    carry = 1, first_B, ends.end(first_B, nothing_BG), nothing_BG.at[:, 0].set(first_B), prompt.cache
    n, last_B, _, tokens_BG, cache = jax.lax.while_loop(unfinished, decode, carry)
    return jnp.where(jnp.arange(max_new_tokens) < n, tokens_BG, last_B[:, None]), cache


def _expect(decode_one: Callable, prompt: Prompt, numbers: Numbers) -> tuple[jax.Array, jax.Array]:
    """Returns expected_B and mass_B: the mean of the numbers that may follow, weighted by their probabilities.

    A search through the tree of number prefixes: the BEAMS most probable ones of each length are decoded side by side.
    Each is a complete number with the probability that anything but a part of the number follows. The tokens of a
    beam take slots of their own and see the prompt and their ancestors, so the prompt's keys are not copied.
    """
    rows, slots = prompt.seen_BS.shape
    shape, beam_Q = (rows, BEAMS), jnp.arange(BEAMS)
    one_empty_prefix = Beams(
        log_p_BQ=jnp.broadcast_to(jnp.where(beam_Q == 0, 0.0, -jnp.inf), shape),
        mantissa_BQ=jnp.zeros(shape, jnp.int32),
        decimals_BQ=jnp.full(shape, -1),
        has_digit_BQ=jnp.zeros(shape, bool),
        token_BQ=jnp.zeros(shape, jnp.int32),
        seen_BQS=jnp.broadcast_to(prompt.seen_BS[:, None], (rows, BEAMS, slots)),
    )

    def unfinished(carry) -> jax.Array:
        length, beams, _, _, _ = carry
        return (length <= NUMBER_TOKENS) & (beams.log_p_BQ > -jnp.inf).any()

    def decode(carry):
        length, beams, mass_B, sum_B, cache = carry
        slot = prompt.slot + (length - 1) * BEAMS
        own_QS = jnp.arange(slots) == (slot + beam_Q)[:, None]
        beams = beams._replace(seen_BQS=beams.seen_BQS | own_QS)
        position_BQ = jnp.broadcast_to((prompt.next_position_B + length - 1)[:, None], shape)
        logits_BQV, cache = decode_one(beams.token_BQ, position_BQ, slot, beams.seen_BQS, cache)
        beams, more_mass_B, more_sum_B = _grow(beams, logits_BQV, numbers)
        return length + 1, beams, mass_B + more_mass_B, sum_B + more_sum_B, cache

    carry = 1, *_grow(one_empty_prefix, prompt.logits_BV[:, None], numbers), prompt.cache
    _, _, mass_B, sum_B, _ = jax.lax.while_loop(unfinished, decode, carry)
    return jnp.where(mass_B > 0, sum_B / jnp.where(mass_B > 0, mass_B, 1.0), jnp.nan), mass_B


def _grow(beams: Beams, logits_BQV: jax.Array, numbers: Numbers) -> tuple[Beams, jax.Array, jax.Array]:
    """Returns the most probable prefixes that are one token longer, and the mass and Σ p·value of complete numbers."""
    log_end_BQ, log_symbol_BQ11 = _symbol_log_p(logits_BQV, numbers, beams.decimals_BQ >= 0)
    is_number_BQ = beams.has_digit_BQ & ((beams.mantissa_BQ > 0) | numbers.may_be_zero)
    p_BQ = jnp.where(is_number_BQ, jnp.exp(beams.log_p_BQ + log_end_BQ), 0.0)
    value_BQ = beams.mantissa_BQ / 10.0 ** jnp.maximum(beams.decimals_BQ, 0)

    log_child_BN = (beams.log_p_BQ[..., None] + log_symbol_BQ11).reshape(len(p_BQ), -1)
    log_p_BQ, child_BQ = jax.lax.top_k(log_child_BN, BEAMS)
    followed_B1 = jnp.exp(log_p_BQ).sum(axis=1, keepdims=True) > NEGLIGIBLE
    parent_BQ, symbol_BQ = child_BQ // (POINT + 1), child_BQ % (POINT + 1)
    mantissa_BQ, decimals_BQ, has_digit_BQ = (
        jnp.take_along_axis(of_parent_BQ, parent_BQ, axis=1)
        for of_parent_BQ in (beams.mantissa_BQ, beams.decimals_BQ, beams.has_digit_BQ)
    )
    is_point_BQ = symbol_BQ == POINT
    grown = Beams(
        log_p_BQ=jnp.where(followed_B1, log_p_BQ, -jnp.inf),
        mantissa_BQ=jnp.where(is_point_BQ, mantissa_BQ, 10 * mantissa_BQ + symbol_BQ),
        decimals_BQ=jnp.where(is_point_BQ, 0, decimals_BQ + (decimals_BQ >= 0)),
        has_digit_BQ=has_digit_BQ | ~is_point_BQ,
        token_BQ=jnp.asarray([*numbers.digits, numbers.point])[symbol_BQ],
        seen_BQS=jnp.take_along_axis(beams.seen_BQS, parent_BQ[..., None], axis=1),
    )
    return grown, p_BQ.sum(axis=1), (p_BQ * value_BQ).sum(axis=1)


def _symbol_log_p(logits_BQV: jax.Array, numbers: Numbers, has_point_BQ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log probabilities that the number ends, and that it goes on with each digit or the point.

    A second point ends a number. What ends one is summed up, not taken as what the symbols leave of 1: it may be small.
    """
    symbols_11 = jnp.asarray([*numbers.digits, numbers.point])
    symbol_BQ11 = logits_BQV[..., symbols_11]
    is_symbol_V = jnp.zeros(logits_BQV.shape[-1], bool).at[symbols_11].set(True)
    other_BQ = jax.nn.logsumexp(jnp.where(is_symbol_V, -jnp.inf, logits_BQV), axis=-1)
    all_BQ = jnp.logaddexp(other_BQ, jax.nn.logsumexp(symbol_BQ11, axis=-1))
    point_BQ = jnp.where(has_point_BQ, symbol_BQ11[..., POINT], -jnp.inf)
    forbidden_BQ11 = has_point_BQ[..., None] & (jnp.arange(POINT + 1) == POINT)
    log_symbol_BQ11 = jnp.where(forbidden_BQ11, -jnp.inf, symbol_BQ11 - all_BQ[..., None])
    return jnp.logaddexp(other_BQ, point_BQ) - all_BQ, log_symbol_BQ11
