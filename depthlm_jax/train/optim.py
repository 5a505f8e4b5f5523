"""Which parameters are trained, and AdamW on them: cosine decay, linear warm-up, clipping by the global norm."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping

import optax

from depthlm_jax import config, tree
from depthlm_jax.errors import InputError

DECAYED = ("kernel", "embedding", "lora_a", "lora_b")  # not biases and norms, as in transformers.Trainer


def trainable(paths: Iterable[str], groups: Mapping[str, config.Group]) -> dict[str, float]:
    """Returns {path: factor of its learning rate}; 0: frozen. Parameters in no group have factor 1.

    Raises:
      InputError: a pattern that is no regular expression or matches nothing, a parameter that two match, or nothing
        left to train.
    """
    paths = list(paths)
    owner: dict[str, str] = {}
    for name, group in groups.items():
        for path in _matches(name, group.pattern, paths):
            if path in owner:
                raise InputError(
                    f"config: optim.groups.{owner[path]} and optim.groups.{name} share a parameter", found=path,
                    expected="one group, or none, for each parameter",
                    fix=f"narrow --config.optim.groups.{name}.pattern",
                )  # fmt: skip
            owner[path] = name
    factors = {path: groups[owner[path]].factor if path in owner else 1.0 for path in paths}
    if not any(factors.values()):
        raise InputError(
            "config: optim.groups freeze every parameter", found=", ".join(f"{name}: factor 0" for name in groups),
            expected="something to train", fix="narrow a pattern, or give a factor above 0",
        )  # fmt: skip
    return factors


def _matches(name: str, pattern: str, paths: list[str]) -> list[str]:
    """Returns the paths that a group's pattern matches from end to end."""
    field = f"optim.groups.{name}.pattern"
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"config: bad value of {field}", found=f"{pattern!r}: {error}", expected="a regular expression",
            fix=f"set --config.{field}='visual/.*', for example",
        ) from error  # fmt: skip
    found = [path for path in paths if rule.fullmatch(path)]
    if not found:
        parts = [path for path in paths if rule.search(path)]
        near = parts or difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
        tops = sorted({path.split("/")[0] for path in paths})
        raise InputError(
            f"config: {field} matches no parameter", found=repr(pattern),
            expected=f"a whole path, such as {', '.join(near[:3])}; all begin with {' or '.join(tops)}",
            fix=f"set --config.{field}=" + (f"'.*({pattern}).*'" if parts else f"'{tops[0]}/.*', for example"),
        )  # fmt: skip
    return found


def split(parameters: Mapping, factors: Mapping[str, float]) -> tuple[dict, dict]:
    """Returns (trained, frozen) parameters, each a nested dict of its part."""
    leaves = tree.flatten(parameters).items()
    trained, frozen = ({path: leaf for path, leaf in leaves if bool(factors[path]) is kind} for kind in (True, False))
    return tree.unflatten(trained), tree.unflatten(frozen)


def join(trained: Mapping, frozen: Mapping) -> dict:
    """Returns the parameters that `split` took apart."""
    return tree.unflatten(tree.flatten(trained) | tree.flatten(frozen))


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
      factors: of `trainable`. As in PyTorch's parameter groups, they scale the decay of a weight too, and the norm that
        gradients are clipped by is that of all trained parameters together.
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
