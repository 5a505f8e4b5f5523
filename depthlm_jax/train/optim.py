"""The optimizers of the trained parameters: cosine decay, linear warm-up, clipping by the global norm."""

import functools
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
    settings: config.Optim, max_steps: int, factors: Mapping[str, float], axes: Mapping[str, str]
) -> optax.GradientTransformation:
    """Returns the optimizer of the trained parameters, float32 master copies.

    Args:
      settings: of the run.
      max_steps: over which the learning rate rises and falls.
      factors: of parameter_groups.factors. As in PyTorch's parameter groups, they scale the decay of a weight too, and
        the norm that gradients are clipped by is that of all trained parameters together.
      axes: letters of each parameter's axes, by path.
    """
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        KINDS[settings.name](settings, make_schedule(settings, max_steps), axes),
        optax.stateless(lambda updates, _: scaled(updates, factors)),
    )


def _adamw(settings: config.Optim, schedule: optax.Schedule, axes: Mapping[str, str]) -> optax.GradientTransformation:
    return optax.adamw(
        schedule, settings.adam_b1, settings.adam_b2, settings.adam_eps, weight_decay=settings.weight_decay,
        mask=decayed,
    )  # fmt: skip


def _lion(settings: config.Optim, schedule: optax.Schedule, axes: Mapping[str, str]) -> optax.GradientTransformation:
    """One moment. Source: Chen et al. 2023, who use a third to a tenth of AdamW's learning rate, and b2 = 0.99."""
    return optax.lion(
        schedule, settings.adam_b1, settings.adam_b2, weight_decay=settings.weight_decay, mask=decayed
    )  # fmt: skip


def _adafactor(settings: config.Optim, schedule: optax.Schedule, axes: Mapping[str, str]):
    """Sums over rows and columns in place of moments. Source: Shazeer & Stern 2018, without relative step sizes."""
    return optax.adafactor(
        schedule, multiply_by_parameter_scale=False, weight_decay_rate=settings.weight_decay or None,
        weight_decay_mask=decayed,
    )  # fmt: skip


def _muon(settings: config.Optim, schedule: optax.Schedule, axes: Mapping[str, str]) -> optax.GradientTransformation:
    """Orthogonal steps for kernels of layers, AdamW for the rest. Source: Jordan et al. 2024, Liu et al. 2025."""
    moved = optax.contrib.muon(
        schedule, consistent_rms=0.2, adam_b1=settings.adam_b1, adam_b2=settings.adam_b2, eps=settings.adam_eps,
        muon_weight_dimension_numbers=functools.partial(tree.map_paths, lambda path: _matrix_axes(path, axes[path])),
    )  # fmt: skip
    # Its own decay would act on biases and norms, too.
    decay = optax.add_decayed_weights(lambda count: -settings.weight_decay * schedule(count), decayed)
    return optax.chain(moved, decay)


def _matrix_axes(path: str, letters: str) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns (in, out) of a stack of matrices, the other axes being a batch: LD3H → 1, 3; None: AdamW's."""
    if not (letters.startswith("L") and path.endswith("kernel")):
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=len(letters) - 1)


KINDS = {"adamw": _adamw, "adafactor": _adafactor, "lion": _lion, "muon": _muon}


def decayed(parameters: Mapping) -> dict:
    """Returns, for each parameter, whether weight decay acts on it."""
    return tree.map_paths(lambda path: path.endswith(DECAYED), parameters)


def scaled(updates: Mapping, factors: Mapping[str, float]) -> dict:
    """Returns the updates times the factors of their paths."""
    return tree.unflatten({path: update * factors[path] for path, update in tree.flatten(updates).items()})
