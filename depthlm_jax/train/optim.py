"""AdamW with cosine decay, linear warm-up and clipping by the global norm."""

import math

import optax

from depthlm_jax import config, tree

DECAYED = ("kernel", "embedding")  # not biases and norms, as in transformers.Trainer


def make_schedule(settings: config.Optim, max_steps: int) -> optax.Schedule:
    """Returns step → learning rate: linear warm-up over warmup_ratio of the steps, then cosine to 0.

    Source: transformers.get_cosine_schedule_with_warmup, which the official training uses.
    """
    warmup = math.ceil(settings.warmup_ratio * max_steps)
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup else settings.learning_rate, settings.learning_rate, warmup, max(max_steps, warmup + 1)
    )


def make_optimizer(settings: config.Optim, max_steps: int) -> optax.GradientTransformation:
    """Returns the optimizer of float32 master parameters."""
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(
            make_schedule(settings, max_steps), settings.adam_b1, settings.adam_b2, settings.adam_eps,
            weight_decay=settings.weight_decay, mask=decayed,
        ),
    )  # fmt: skip


def decayed(parameters: dict) -> dict:
    """Returns, for each parameter, whether weight decay acts on it."""
    return tree.unflatten({path: path.endswith(DECAYED) for path in tree.flatten(parameters)})
