"""AdamW on the trained parameters: cosine decay, linear warm-up, clipping by the global norm."""

import math
from collections.abc import Mapping

import optax

from depthlm_jax import config, tree

DECAYED = ("kernel", "embedding", "lora_a", "lora_b")  # not biases and norms, as in transformers.Trainer


def make_schedule(settings: config.Optim, max_steps: int) -> optax.Schedule:
    """Returns step → learning rate: linear warm-up over warmup_ratio of the steps, then cosine to 0.

    Source: transformers.get_cosine_schedule_with_warmup, which the official training uses.
    """
    warmup = math.ceil(settings.warmup_ratio * max_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else settings.learning_rate, settings.learning_rate, warmup, max(max_steps, warmup + 1)
    )


def make_optimizer(
    settings: config.Optim, max_steps: int, factors: Mapping[str, float]
) -> optax.GradientTransformation:
    """Returns the optimizer of the trained parameters, float32 master copies.

    Args:
      settings: of the run.
      max_steps: over which the learning rate rises and falls.
      factors: of parameter_groups.factors. As in PyTorch's parameter groups, they scale the decay of a weight too, and
        the norm that gradients are clipped by is that of all trained parameters together.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            make_schedule(settings, max_steps), settings.adam_b1, settings.adam_b2, settings.adam_eps,
            weight_decay=settings.weight_decay, mask=decayed,
        ),
        optax.stateless(lambda updates, _: scaled(updates, factors)),
    )  # fmt: skip


def decayed(parameters: Mapping) -> dict:
    """Returns, for each parameter, whether weight decay acts on it."""
    return tree.unflatten({path: path.endswith(DECAYED) for path in tree.flatten(parameters)})


def scaled(updates: Mapping, factors: Mapping[str, float]) -> dict:
    """Returns the updates times the factors of their paths."""
    return tree.unflatten({path: update * factors[path] for path, update in tree.flatten(updates).items()})
