"""The training step: a plain function of (state, batch)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from depthlm_jax import tree


class State(NamedTuple):
    """What a step changes. Parameters and optimizer state are float32 master copies."""

    step: jax.Array
    parameters: dict
    optimizer: optax.OptState


def answer_loss(logits_BAV: jax.Array, targets_BA: jax.Array, weights_BA: jax.Array) -> dict[str, jax.Array]:
    """Returns sums over the supervised positions: weighted cross-entropy, weight, right tokens and their number."""
    loss_BA = optax.softmax_cross_entropy_with_integer_labels(logits_BAV.astype(jnp.float32), targets_BA)
    counted_BA = weights_BA > 0
    return {
        "loss": jnp.sum(loss_BA * weights_BA),
        "weight": jnp.sum(weights_BA),
        "right": jnp.sum((logits_BAV.argmax(-1) == targets_BA) & counted_BA),
        "tokens": jnp.sum(counted_BA),
    }


def make_train_step(logits: Callable, optimizer: optax.GradientTransformation, compute_dtype, accumulate: int):
    """Returns step(state, batch) → (state, metrics); the caller jits it with shardings and donation.

    The loss is Σ ÷ Σ: weighted cross-entropies and weights are summed over micro-batches and devices and divided once.

    Args:
      logits: (parameters, batch) → logits_BAV.
      optimizer: of the float32 parameters; may be scaled by a schedule.
      compute_dtype: of forward and backward pass.
      accumulate: number of micro-batches that the rows of a batch are divided into.
    """

    def micro_sums(parameters: dict, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
        logits_BAV = logits(tree.cast(parameters, compute_dtype), batch)
        sums = answer_loss(logits_BAV, batch["targets_BA"], batch["weights_BA"])
        return sums["loss"], sums

    def add_micro(carry, batch):
        (_, sums), gradient = jax.value_and_grad(micro_sums, has_aux=True)(carry[2], batch)
        return (*jax.tree.map(jnp.add, carry[:2], (sums, gradient)), carry[2]), None

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict]:
        (_, sums), gradient = _sum_micro(micro_sums, add_micro, state.parameters, batch, accumulate)
        gradient = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1e-9), gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        metrics = {
            "loss": sums["loss"] / jnp.maximum(sums["weight"], 1e-9),
            "mean_token_accuracy": sums["right"] / jnp.maximum(sums["tokens"], 1),
            "num_tokens": sums["tokens"],
            "grad_norm": optax.tree.norm(gradient),
        }
        return State(state.step + 1, optax.apply_updates(state.parameters, updates), optimizer_state), metrics

    return step


def _sum_micro(micro_sums, add_micro, parameters, batch, accumulate):
    """Returns ((loss, sums), gradient) of the whole batch, one micro-batch at a time in memory."""
    if accumulate == 1:
        return jax.value_and_grad(micro_sums, has_aux=True)(parameters, batch)
    # Every device's own rows are dealt out to the micro-batches, so that no row moves between devices.
    dealt = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
    sums = {"loss": 0.0, "weight": 0.0, "right": 0, "tokens": 0}
    zero = jax.tree.map(jnp.asarray, sums), jax.tree.map(jnp.zeros_like, parameters)
    (sums, gradient, _), _ = jax.lax.scan(add_micro, (*zero, parameters), dealt)
    return (sums["loss"], sums), gradient
