"""The training step: a plain function of (state, batch)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from depthlm_jax import parameter_groups, tree

METRICS = {  # of a step → their letters
    **dict.fromkeys(("loss", "mean_token_accuracy", "num_tokens", "grad_norm", "sound"), ""),
    "loss_BA": "BA",
}


class State(NamedTuple):
    """What a step changes. Trained parameters are float32 master copies, and so are their moments; others have none."""

    step: jax.Array
    parameters: dict
    optimizer: optax.OptState


def answer_loss(logits_BAV: jax.Array, targets_BA: jax.Array, weights_BA: jax.Array) -> dict[str, jax.Array]:
    """Returns sums over the supervised positions: weighted cross-entropy, weight, right tokens and their number.

    `loss_BA` has the terms of the first one.
    """
    loss_BA = optax.softmax_cross_entropy_with_integer_labels(logits_BAV.astype(jnp.float32), targets_BA)
    counted_BA = weights_BA > 0
    return {
        "loss": jnp.sum(loss_BA * weights_BA),
        "loss_BA": loss_BA * weights_BA,
        "weight": jnp.sum(weights_BA),
        "right": jnp.sum((logits_BAV.argmax(-1) == targets_BA) & counted_BA),
        "tokens": jnp.sum(counted_BA),
    }


def make_gradient(
    logits: Callable, compute_dtype, accumulate: int, accumulation_dtype=jnp.float32
) -> Callable[[dict, dict, dict], tuple[tuple[dict, dict], jax.Array]]:
    """Returns gradient(trained, frozen, batch) → ((sums, gradient of their loss), loss_BA); nothing is divided yet.

    Micro-batches are in memory one at a time.

    Args:
      logits: (parameters, batch) → logits_BAV.
      compute_dtype: of forward and backward pass.
      accumulate: number of micro-batches that the rows of a batch are divided into.
      accumulation_dtype: of the sum of their gradients.
    """

    def loss_and_sums(trained: dict, frozen: dict, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
        logits_BAV = logits(tree.cast(parameter_groups.join(trained, frozen), compute_dtype), batch)
        sums = answer_loss(logits_BAV, batch["targets_BA"], batch["weights_BA"])
        return sums["loss"], sums

    differentiate = jax.value_and_grad(loss_and_sums, has_aux=True)

    def of_micro_batch(trained: dict, frozen: dict, batch: dict[str, jax.Array]) -> tuple[tuple, jax.Array]:
        (_, sums), gradient = differentiate(trained, frozen, batch)
        loss_BA = sums.pop("loss_BA")
        return (sums, gradient), loss_BA

    def of_batch(trained: dict, frozen: dict, batch: dict[str, jax.Array]) -> tuple[tuple, jax.Array]:
        # Every device's own rows are dealt out to the micro-batches, so that no row moves between devices.
        dealt = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        shapes, _ = jax.eval_shape(of_micro_batch, trained, frozen, jax.tree.map(lambda x: x[0], dealt))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        zero = zero[0], tree.cast(zero[1], accumulation_dtype)

        def add(total: tuple[dict, dict], micro: dict[str, jax.Array]):
            part, loss_BA = of_micro_batch(trained, frozen, micro)
            return jax.tree.map(lambda sum_, x: sum_ + x.astype(sum_.dtype), total, part), loss_BA

        (sums, gradient), losses = jax.lax.scan(add, zero, dealt)
        loss_BA = losses.swapaxes(0, 1).reshape(-1, losses.shape[-1])
        return (sums, tree.cast(gradient, jnp.float32)), loss_BA

    return of_micro_batch if accumulate == 1 else of_batch


def make_train_step(
    logits: Callable,
    optimizer: optax.GradientTransformation,
    factors: Mapping[str, float],
    compute_dtype,
    accumulate: int,
    accumulation_dtype=jnp.float32,
) -> Callable:
    """Returns step(state, batch) → (state, metrics); the caller jits it with shardings and donation.

    Metrics are numbers but for `loss_BA`, the weighted cross-entropy of each supervised position.

    The loss is Σ ÷ Σ: weighted cross-entropies and weights are summed over micro-batches and devices and divided once.
    Where the loss or the norm of the gradient is not finite, the step changes nothing but its number.

    Args:
      logits: as in `make_gradient`, and so are the dtypes and `accumulate`.
      optimizer: of the trained parameters, and of them alone.
      factors: of parameter_groups.factors; parameters with factor 0 are not differentiated, and stay as they are.
      compute_dtype: of forward and backward pass.
      accumulate: number of micro-batches.
      accumulation_dtype: of the sum of their gradients.
    """
    add_up = make_gradient(logits, compute_dtype, accumulate, accumulation_dtype)

    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict]:
        trained, frozen = parameter_groups.split(state.parameters, factors)
        (sums, gradient), loss_BA = add_up(trained, frozen, batch)
        weight = jnp.maximum(sums["weight"], 1e-9)
        gradient = jax.tree.map(lambda g: g / weight, gradient)
        updates, moments = optimizer.update(gradient, state.optimizer, trained)
        loss, grad_norm = sums["loss"] / weight, optax.tree.norm(gradient)
        sound = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {
            "loss": loss,
            "mean_token_accuracy": sums["right"] / jnp.maximum(sums["tokens"], 1),
            "num_tokens": sums["tokens"],
            "grad_norm": grad_norm,
            "sound": sound,
            "loss_BA": loss_BA,
        }
        new, old = (optax.apply_updates(trained, updates), moments), (trained, state.optimizer)
        trained, moments = jax.tree.map(lambda after, before: jnp.where(sound, after, before), new, old)
        return State(state.step + 1, parameter_groups.join(trained, frozen), moments), metrics

    return step
