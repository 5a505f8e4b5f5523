"""What every row is made of, decided from sizes alone: no pixel is decoded, no record read.

A sample is named by (source, draw): the draw-th sample of a source is the same in every run with the same seed. Samples
come in the order of the mixture and wait, at most WAITING at a time, until they fill a row well; the oldest goes first,
so none waits for long. All hosts and workers make the same plan, each takes its own rows from it. The position in the
plan is small and says all that is needed to go on from any step, on any number of hosts, also with another mixture.
"""

import dataclasses
import threading
import zlib
from collections import OrderedDict

import numpy as np

from depthlm_jax import batch as batch_contract
from depthlm_jax import config as config_module
from depthlm_jax.data import camera, mixture, order, packing, tasks, transforms
from depthlm_jax.data.records import Records
from depthlm_jax.errors import InputError

WAITING = 64  # samples; twice as many fill rows at most 1 % better and take longer to plan
CHUNK = 1024  # draws of a source that are sized at a time
NUMBERS = 8  # random numbers of a draw: task, the six of a view, partner
REACH = 8  # how many records away the second image of a pair may stand


@dataclasses.dataclass(frozen=True)
class Slot:
    """A sample that is planned but not made."""

    source: str
    draw: int
    record: int
    partner: int  # record of the second image; −1: there is none
    task: str
    chance: camera.Chance
    size: tuple[int, int, int]  # tokens, patch slots, supervised positions: upper bounds
    too_large: tuple[int, int, int] | None = None  # its size, if no row can hold it: it will be dropped


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a plan stands; JSON by `dataclasses.asdict`."""

    step: int = 0
    stage: int = 0  # times that the mixture was changed
    slot: int = 0  # slots of this stage that have been taken
    shares: dict[str, float] = dataclasses.field(default_factory=dict)  # of this stage
    draws: dict[str, int] = dataclasses.field(default_factory=dict)  # samples that each source has given
    waiting: tuple[tuple[str, int], ...] = ()  # (source, draw), oldest first


class SourcePlan:
    """The endless samples of one source: record, view and size of any draw."""

    def __init__(self, name: str, records: Records, sizer: "Sizer", config: config_module.Config):
        self.name, self.index, self.sizer, self.config = name, records.index, sizer, config
        self.key = (config.train.seed, *key_of(name))
        self.chunks: OrderedDict[int, list[Slot]] = OrderedDict()

    def slot(self, draw: int) -> Slot:
        chunk, place = divmod(draw, CHUNK)
        if chunk not in self.chunks:
            self.chunks[chunk] = self._plan(chunk)
            if len(self.chunks) > 2:
                self.chunks.popitem(last=False)
        return self.chunks[chunk][place]

    def _plan(self, chunk: int) -> list[Slot]:
        draws_N = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
        records_N = order.shuffled(draws_N, len(self.index), self.key)
        chance_NK = np.random.default_rng((*self.key, chunk)).random((CHUNK, NUMBERS))
        task_N = self.sizer.draw_tasks(chance_NK[:, 0])
        partner_N, image_N3 = np.full(CHUNK, -1), self._image_sizes(records_N, chance_NK)
        for place in np.flatnonzero(self.sizer.pairs_T[task_N]):
            partner = partner_of(self.index["scene"], int(records_N[place]), chance_NK[place, -1])
            if partner >= 0:
                partner_N[place] = partner
                image_N3[place] += self._image_sizes(np.array([partner]), chance_NK[place : place + 1])[0]
        alone_N = self.sizer.pairs_T[task_N] & (partner_N < 0)  # these are asked something else, if there is anything
        task_N[alone_N] = self.sizer.draw_tasks(chance_NK[alone_N, -1], pairs=False)
        size_N3 = image_N3 + self.sizer.text_T3[task_N]
        fits_N = (size_N3 <= self.sizer.capacity_3).all(axis=1)
        planned_N3 = np.where(fits_N[:, None], size_N3, self.sizer.smallest_T3[task_N])
        return [
            Slot(
                self.name, draw, record, partner, self.sizer.tasks[task], camera.Chance(*numbers[1:-1]), tuple(size),
                None if fits else tuple(real),
            )
            for draw, record, partner, task, numbers, size, fits, real in zip(
                draws_N.tolist(), records_N.tolist(), partner_N.tolist(), task_N, chance_NK.tolist(),
                planned_N3.tolist(), fits_N, size_N3.tolist(), strict=True,
            )
        ]  # fmt: skip

    def _image_sizes(self, records_N: np.ndarray, chance_NK: np.ndarray) -> np.ndarray:
        """Returns (N, 3): tokens, patch slots and supervised positions of each record's image in its view."""
        rows, geometry = self.index[records_N], self.config.data.geometry
        width_N, height_N = camera.view_size(
            rows["width"], rows["height"], rows["fx"], rows["fy"], geometry, self.sizer.grid_px, chance_NK[:, 1:-1],
            self.config.data.sources[self.name].aspect_jitter,
        )  # fmt: skip
        return self.sizer.image_sizes(width_N, height_N)


def key_of(source: str) -> tuple[int]:
    """Returns what the source's name adds to a seed."""
    return (zlib.crc32(source.encode()),)


def partner_of(scene_N: np.ndarray, record: int, chance: float) -> int:
    """Returns a record near this one that shows the same scene, or −1.

    Args:
      scene_N: scene numbers of all records; 0: of no scene.
      record: the first of the pair.
      chance: in [0, 1), decides between those that there are.
    """
    near = np.arange(max(0, record - REACH), min(len(scene_N), record + REACH + 1))
    near = near[(near != record) & (scene_N[near] == scene_N[record]) & (scene_N[record] != 0)]
    return int(near[int(chance * len(near))]) if len(near) else -1


class Sizer:
    """How many tokens, patch slots and supervised positions a sample has at most."""

    def __init__(self, processor, config: config_module.Config, shape: batch_contract.RowShape):
        self.processor, sizes = processor, processor.config
        self.grid_px, self.limits = sizes.grid_px, (sizes.min_pixels, sizes.max_pixels, sizes.longest_px)
        self.capacity_3 = np.array([shape.tokens, shape.patches, shape.answers])
        self.official = config.data.geometry.mode == "official"
        self.words_count = config.train.loss_on == "official"
        weights = dataclasses.asdict(config.data.tasks)
        self.tasks = [name for name, weight in weights.items() if weight > 0]
        if not self.tasks:
            raise InputError(
                "config: no task", found="every weight in data.tasks is 0", expected="one above 0",
                fix="set --config.data.tasks.distance=1.0",
            )  # fmt: skip
        self.weight_T = np.array([weights[name] for name in self.tasks])
        self.pairs_T = np.array([tasks.TASKS[name].images == 2 for name in self.tasks])
        self.text_T3 = np.array([self._text(name, config) for name in self.tasks])
        cell_3 = self._image_size(np.array([self.grid_px]), np.array([self.grid_px]))
        self.smallest_T3 = self.text_T3 + (1 + self.pairs_T)[:, None] * cell_3
        self._check_smallest()

    def draw_tasks(self, chance_N: np.ndarray, pairs: bool = True) -> np.ndarray:
        """Returns the number of a task for each chance in [0, 1); without those of two images, if others are left."""
        weight_T = self.weight_T if pairs or self.pairs_T.all() else self.weight_T * ~self.pairs_T
        total_T = np.cumsum(weight_T)
        return np.searchsorted(total_T[:-1] / total_T[-1], chance_N, side="right")

    def _check_smallest(self) -> None:
        for name, size_3 in zip(self.tasks, self.smallest_T3, strict=True):
            for field, size, limit in zip(packing.LIMITS.values(), size_3, self.capacity_3, strict=True):
                if size > limit:
                    raise InputError(
                        f"config: a row is too small for a question about the smallest image ({name})",
                        found=f"{field}={limit}", expected=f"at least {size}, and room for the image",
                        fix=f"raise --config.{field}, or lower --config.data.reference.questions",
                    )  # fmt: skip

    def _text(self, task: str, config: config_module.Config) -> tuple[int, int, int]:
        data, images = config.data, tasks.TASKS[task].images
        asked = transforms.widest(task, data)
        turns = [(asked.question, asked.answer)] * transforms.questions_of(task, data)
        tokens, answers = self.processor.text_size(images, turns, data.reference.layout, config.train.loss_on)
        return tokens, 0, answers

    def image_sizes(self, width_N: np.ndarray, height_N: np.ndarray) -> np.ndarray:
        """Returns (N, 3) for images of these sizes in px; of one cell where `look` will refuse."""
        if self.official:
            sizes = [self._snapped(int(width), int(height)) for width, height in zip(width_N, height_N, strict=True)]
            width_N, height_N = np.array(sizes).T
        else:
            allowed_N = (self.limits[0] <= width_N * height_N) & (width_N * height_N <= self.limits[1])
            allowed_N &= np.maximum(width_N, height_N) <= (self.limits[2] or np.inf)
            width_N, height_N = (np.where(allowed_N, side_N, self.grid_px) for side_N in (width_N, height_N))
        return self._image_size(width_N, height_N)

    def _image_size(self, width_N: np.ndarray, height_N: np.ndarray) -> np.ndarray:
        tokens_N, slots_N, words_N = self.processor.image_size(width_N, height_N)
        return np.stack([tokens_N, slots_N, words_N * self.words_count], axis=-1)

    def _snapped(self, width: int, height: int) -> tuple[int, int]:
        try:
            return camera.processor_size(height, width, self.grid_px, *self.limits)[::-1]
        except (InputError, ZeroDivisionError):
            return self.grid_px, self.grid_px


class Planner:
    """Gives the rows of one step after the other."""

    def __init__(
        self, sources: dict[str, Records], processor, config: config_module.Config, shape: batch_contract.RowShape,
        position: Position,
    ):  # fmt: skip
        sizer = Sizer(processor, config, shape)
        self.config, self.seed, self.capacity_3 = config, config.train.seed, sizer.capacity_3
        self.sources = {name: SourcePlan(name, records, sizer, config) for name, records in sources.items()}
        sizes = {name: len(records) for name, records in sources.items()}
        self.position = resumed(position, mixture.shares(config.data.sources, sizes, config.data.mixture))
        self.draws = {name: self.position.draws.get(name, 0) for name in sources} | self.position.draws
        self.slot, self.block, self.block_order = self.position.slot, -1, None
        waiting = self.position.waiting
        self.away = tuple(one for one in waiting if one[0] not in self.sources)  # of sources that were turned off
        self.waiting = [self.sources[name].slot(draw) for name, draw in waiting if name in self.sources]
        self.size_N3 = np.zeros((WAITING + len(self.waiting), 3), int)  # of the waiting samples, in their order
        self.size_N3[: len(self.waiting)] = np.array([slot.size for slot in self.waiting]).reshape(-1, 3)

    def next_step(self) -> tuple[list[list[Slot]], Position]:
        """Returns the slots of each row of the next step, and the position after it."""
        rows = [self._next_row() for _ in range(self.config.data.global_batch_rows)]
        waiting = tuple((slot.source, slot.draw) for slot in self.waiting)
        self.position = dataclasses.replace(
            self.position, step=self.position.step + 1, slot=self.slot, draws=dict(self.draws),
            waiting=waiting + self.away,
        )  # fmt: skip
        return rows, self.position

    def _next_row(self) -> list[Slot]:
        row, free_3 = [], self.capacity_3.copy()
        while True:
            self._top_up()
            picked = packing.pick(self.size_N3[: len(self.waiting)], free_3, self.capacity_3, oldest=not row)
            if not picked:
                return row
            row += [self.waiting[place] for place in picked]
            free_3 -= self.size_N3[picked].sum(axis=0)
            for place in sorted(picked, reverse=True):
                del self.waiting[place]
                self.size_N3[place:-1] = self.size_N3[place + 1 :]

    def _top_up(self) -> None:
        while len(self.waiting) < WAITING:
            slot = self._draw()
            self.size_N3[len(self.waiting)] = slot.size
            self.waiting.append(slot)

    def _draw(self) -> Slot:
        block, place = divmod(self.slot, mixture.BLOCK)
        if block != self.block:
            share_S = np.array(list(self.position.shares.values()))
            self.block, self.block_order = block, mixture.block_sources(share_S, self.seed, self.position.stage, block)
        name = list(self.position.shares)[self.block_order[place]]
        slot = self.sources[name].slot(self.draws[name])
        self.slot, self.draws[name] = self.slot + 1, self.draws[name] + 1
        return slot


def resumed(position: Position, shares: dict[str, float]) -> Position:
    """Returns the position with these shares; others than it had begin a new stage, in which draws go on counting."""
    if position.shares == shares:
        return position
    changed = bool(position.shares)
    return dataclasses.replace(position, stage=position.stage + changed, slot=0, shares=shares)


def position_of(state: dict) -> Position:
    """Returns the position that `dataclasses.asdict` and JSON made a dict of."""
    return Position(**{**state, "waiting": tuple((name, draw) for name, draw in state["waiting"])})


class StepPlans:
    """The plan of any step from the first one on, for several threads that ask for steps near one another."""

    def __init__(self, planner: Planner, kept: int):
        self.planner, self.kept, self.lock = planner, kept, threading.Lock()
        self.steps: OrderedDict[int, tuple[list[list[Slot]], Position]] = OrderedDict()

    def __getitem__(self, step: int) -> tuple[list[list[Slot]], Position]:
        """Returns `next_step()` of a step counted from the start of the plan; the last `kept` ones are remembered."""
        with self.lock:
            if self.steps and step < next(iter(self.steps)):
                raise LookupError(f"step {step} was planned and forgotten; steps kept: {self.kept}")
            while step not in self.steps:
                rows, position = self.planner.next_step()
                self.steps[position.step - 1] = rows, position
                if len(self.steps) > self.kept:
                    self.steps.popitem(last=False)
            return self.steps[step]
