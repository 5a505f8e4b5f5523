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

    differentiate = jax.value_and_grad(micro_sums, has_aux=True)

    def sums_and_gradient(parameters: dict, batch: dict[str, jax.Array]) -> tuple[dict, dict]:
        (_, sums), gradient = differentiate(parameters, batch)
        return sums, gradient

    def add_up(parameters: dict, batch: dict[str, jax.Array]) -> tuple[dict, dict]:
        """Returns sums and gradient of all micro-batches, one at a time in memory."""
        if accumulate == 1:
            return sums_and_gradient(parameters, batch)
        # Every device's own rows are dealt out to the micro-batches, so that no row moves between devices.
        dealt = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        shapes = jax.eval_shape(sums_and_gradient, parameters, jax.tree.map(lambda x: x[0], dealt))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total: tuple[dict, dict], micro: dict[str, jax.Array]):
            return jax.tree.map(jnp.add, total, sums_and_gradient(parameters, micro)), None

        return jax.lax.scan(add, zero, dealt)[0]

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict]:
        sums, gradient = add_up(state.parameters, batch)
        weight = jnp.maximum(sums["weight"], 1e-9)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        metrics = {
            "loss": sums["loss"] / weight,
            "mean_token_accuracy": sums["right"] / jnp.maximum(sums["tokens"], 1),
            "num_tokens": sums["tokens"],
            "grad_norm": optax.tree.norm(gradient),
        }
        return State(state.step + 1, optax.apply_updates(state.parameters, updates), optimizer_state), metrics

    return step
