"""Metrics and evaluations of a run for TensorBoard and Weights & Biases, beside the JSON lines that are always written.

One that fails (disk full, network gone) is told of once and left alone: training goes on.
"""

import dataclasses
import importlib.util
import math
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from depthlm_jax import config as config_module
from depthlm_jax import log
from depthlm_jax.errors import InputError

SECTIONS = {  # of metrics, by name or by what stands before the '/'; others: train
    "loss/": "loss_by_source", "share/": "mixture",
    **dict.fromkeys(("samples_per_second", "tokens_per_second", "tflops_per_second_per_device", "mfu"), "speed"),
    **dict.fromkeys(("filled_tokens", "filled_patches", "data_wait", "samples_dropped"), "data"),
}  # fmt: skip


class WeightsAndBiases:
    """A run of the service; WANDB_MODE=offline keeps it in the workdir. A step that is done again is sent once."""

    def __init__(self, workdir: Path, config: config_module.Config):
        import wandb  # a package that only those have who ask for it

        self.wandb, name = wandb, workdir / "wandb_id"
        if not name.exists():
            name.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=config.track.wandb_project, dir=workdir, id=name.read_text(), resume="allow",
            name=workdir.resolve().name, config=dataclasses.asdict(config),
        )  # fmt: skip

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        self.run.log({tag: self.wandb.Histogram(values)}, step=step)

    def image(self, step: int, tag: str, file: Path) -> None:
        self.run.log({tag: self.wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        self.run.finish()


class Tracker:
    """Writes to what the config asks for, from process 0 alone, beginning with the first thing to write."""

    def __init__(self, workdir: Path, config: config_module.Config, after: int = 0):
        """`after`: step that training goes on after; what was written of later ones is hidden.

        Raises:
          InputError: a package is missing.
        """
        asked = config.track
        if asked.wandb_project and importlib.util.find_spec("wandb") is None:
            raise InputError(
                "config: track.wandb_project needs the package wandb", found="not installed", expected="wandb",
                fix="pip install wandb, or set --config.track.wandb_project=''",
            )  # fmt: skip
        self.makers: dict[str, Callable] = {}
        self.opened: dict[str, object] = {}
        if jax.process_index() == 0 and asked.tensorboard:
            self.makers["TensorBoard"] = lambda: _tensorboard(workdir / "tensorboard", after)
        if jax.process_index() == 0 and asked.wandb_project:
            self.makers["Weights & Biases"] = lambda: WeightsAndBiases(workdir, config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes metrics of a step, by the names that they have in metrics.jsonl."""
        tagged = {_tag(name): float(value) for name, value in values.items()}
        self._each(lambda one: one.scalars(step, tagged))

    def evaluation(
        self, step: int, name: str, scores: dict, truth: Sequence[float], answers: Sequence[float | None],
        sheet: Path | None = None,
    ) -> None:  # fmt: skip
        """Writes an evaluation.

        Args:
          step: of the parameters.
          name: of the set.
          scores: as in evaluations.jsonl: of `model`, `best_constant` and `expectation`.
          truth: > 0.
          answers: None where none could be read.
          sheet: a PNG with images, markers and answers.
        """
        values = _flat(scores, f"eval/{name}")
        drawn = {"log10_truth": _logs(truth), "log10_answer": _logs(answers)}

        def write(one) -> None:
            one.scalars(step, values)
            for what, logs in drawn.items():
                if len(logs):
                    one.histogram(step, f"eval/{name}/{what}", logs)
            if sheet is not None and sheet.exists():
                one.image(step, f"eval/{name}/answers", sheet)

        self._each(write)

    def close(self) -> None:
        """Ends them; nothing is written later."""
        self.makers = {name: make for name, make in self.makers.items() if name in self.opened}
        self._each(lambda one: one.close())
        self.makers, self.opened = {}, {}

    def _each(self, action: Callable) -> None:
        for name, make in list(self.makers.items()):
            try:
                if name not in self.opened:
                    self.opened[name] = make()
                action(self.opened[name])
            except Exception as error:  # noqa: BLE001 whatever it is, training is worth more
                log.say(f"warning: {name} gets nothing more, training goes on: {type(error).__name__}: {error}")
                del self.makers[name]


def _tensorboard(folder: Path, after: int):
    from depthlm_jax.event_files import TensorBoard  # only now: tensorboardX loads PyTorch where it is installed

    return TensorBoard(folder, after)


def _tag(metric: str) -> str:
    kind, slash, rest = metric.partition("/")
    return f"{SECTIONS.get(kind + slash, 'train')}/{rest or metric}"


def _flat(scores: dict, prefix: str) -> dict[str, float]:
    """Returns the numbers by tag; those of the model without its name."""
    found: dict[str, float] = {}
    for name, value in scores.items():
        if isinstance(value, dict):
            found |= _flat(value, prefix if name == "model" else f"{prefix}/{name}")
        elif isinstance(value, (int, float)):
            found[f"{prefix}/{name}"] = float(value)
    return found


def _logs(numbers: Sequence[float | None]) -> np.ndarray:
    """Returns log10 of those that have one."""
    return np.array([math.log10(number) for number in numbers if number is not None and 0 < number < math.inf])
