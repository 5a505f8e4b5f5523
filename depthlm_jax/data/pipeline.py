"""Sources → plan → samples → rows → batches; and the questions of an evaluation.

Step s of a run trains on the rows that the plan gives it, whatever the number of hosts, worker processes and threads:
each makes the rows that are its own, and nothing but the plan's position has to be kept to go on.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from depthlm_jax import batch as batch_contract
from depthlm_jax import config as config_module
from depthlm_jax.data import official, packing, plan, reference, tasks, transforms, work
from depthlm_jax.data.records import Records, open_source
from depthlm_jax.errors import InputError

APART_M = 0.05  # between two points, or two cameras in evaluation: two decimals have to tell their distance


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record that gave no sample."""

    record_id: str
    reason: str
    bad: bool  # unreadable or invalid, as against: no labelled point inside the crop


@dataclasses.dataclass(frozen=True)
class About:
    """What rows were made of."""

    record_ids: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]  # of each row's samples, in their order
    dropped: tuple[Dropped, ...]
    used: tuple[int, int, int]  # tokens, patch slots and supervised positions that hold something
    work: dict[str, int]  # work.COUNTS of the rows
    position: plan.Position  # of the plan after the step


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the batch contract."""

    arrays: dict[str, np.ndarray]
    about: About


def open_sources(config: config_module.Config, progress: Callable | None = None) -> dict[str, Records]:
    """Returns the records of each training source whose weight is above 0.

    Args:
      config: of the run.
      progress: called with records done and in all while an index is built.

    Raises:
      InputError: nothing there, or no weight.
    """
    on = {name: source for name, source in config.data.sources.items() if source.weight > 0}
    return {name: open_source(source, progress, f"data.sources.{name}") for name, source in on.items()}


def limits_of(processor) -> transforms.Limits:
    sizes = processor.config
    return transforms.Limits(sizes.grid_px, sizes.min_pixels, sizes.max_pixels, sizes.longest_px)


@dataclasses.dataclass(frozen=True)
class SampleMaker:
    """Planned slot → (example, sample), or why there is none."""

    sources: dict[str, Records]
    processor: object  # of the model's family
    config: config_module.Config

    def __call__(self, slot: plan.Slot) -> "tuple[transforms.Example, batch_contract.Sample] | Dropped":
        try:
            self.check_fits(slot)
            example = self.example(slot)
            return example if isinstance(example, Dropped) else (example, self.encode(example, slot))
        except InputError as error:  # its text begins with the id of the record at fault
            return Dropped(str(error).split(": ")[0], str(error), bad=True)

    def check_fits(self, slot: plan.Slot) -> None:
        """Raises InputError if no row can hold the slot's sample."""
        if slot.too_large is not None:
            data = self.config.data
            limits = data.max_tokens, data.max_patches, data.max_answer_tokens
            over = [
                (field, size, limit)
                for field, size, limit in zip(packing.LIMITS.values(), slot.too_large, limits, strict=True)
                if size > limit
            ]
            raise InputError(
                f"{self.sources[slot.source][slot.record].record_id}: the sample does not fit into a row",
                found=", ".join(f"{size} for {field}={limit}" for field, size, limit in over),
                expected="whole samples", fix=f"raise --config.{over[0][0]}, lower the crop sizes or "
                "data.reference.questions, or correct the record's intrinsics",
            )  # fmt: skip

    def example(self, slot: plan.Slot) -> "transforms.Example | Dropped":
        """Returns questions about randomly drawn usable points of the slot's record.

        Raises:
          InputError: the record, or the second one of a pair, is bad.
        """
        data, limits, task = self.config.data, limits_of(self.processor), tasks.TASKS[slot.task]
        jitter = data.sources[slot.source].aspect_jitter
        records = [slot.record, slot.partner][: task.images]
        looks = [
            transforms.look(self.sources[slot.source][index], data, limits, slot.chance, jitter)
            for index in records
            if index >= 0
        ]
        first = looks[0]
        if task.images == 2 and (len(looks) < 2 or any(seen.centre_m is None for seen in looks)):
            return Dropped(first.record_id, "no second image of its scene nearby, or no pose", bad=False)
        rng = np.random.default_rng((self.config.train.seed, *plan.key_of(slot.source), slot.draw))
        points = choose_points(first, slot.task, data, rng)
        if not points:
            return Dropped(first.record_id, "not enough labelled points inside the crop that can be pointed at", False)
        return transforms.example(looks, slot.task, points, data, limits, rng.random(len(points)).tolist())

    def encode(self, example: transforms.Example, slot: plan.Slot) -> batch_contract.Sample:
        """Returns the sample of an example.

        Raises:
          InputError: it is larger than planned.
        """
        turns = [(question.text, question.answer) for question in example.questions]
        sample = self.processor.encode(
            example.images, turns, layout=self.config.data.reference.layout, loss_on=self.config.train.loss_on,
            digit_weight=self.config.train.digit_weight,
        )  # fmt: skip
        if np.any(np.array(packing.size_of(sample)) > slot.size):
            raise InputError(
                f"{example.record_id}: the sample is larger than its declared size allows",
                found=packing.size_of(sample), expected=f"at most {slot.size} (tokens, patch slots, answer tokens)",
                fix="correct W, H of the record's intrinsics, or build the source's index again",
            )  # fmt: skip
        return sample


def choose_points(
    seen: transforms.Look, task: str, data: config_module.Data, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Returns the points of each question, as many questions as the config wants and the image has points for."""
    wanted, needed = transforms.questions_of(task, data), tasks.TASKS[task].points
    usable = np.flatnonzero(seen.usable)
    if needed == 0:
        return [()]
    if needed == 1 and data.geometry.mode == "official" and len(usable):
        random = rng.integers(len(seen.usable), size=wanted)
        drawn = np.array([official.official_training_point(int(one), seen.usable) for one in random])
    else:
        drawn = rng.permutation(usable)
    if wanted > 1:  # two points may share a pixel, but one question has one answer
        drawn = drawn[np.sort(np.unique(seen.pixels[drawn], axis=0, return_index=True)[1])]
    return groups_of(seen, drawn, needed, data.reference, wanted)


def groups_of(
    seen: transforms.Look, drawn: np.ndarray, needed: int, settings: config_module.Reference, wanted: int
) -> list[tuple[int, ...]]:
    """Returns up to `wanted` drawn points, or each with the next one that differs in the picture and in space."""
    if needed == 1:
        return [(int(point),) for point in drawn[:wanted]]
    pairs: dict[tuple[int, ...], None] = {}  # no pair twice
    for place, point in enumerate(drawn):
        if len(pairs) == wanted:
            break
        others = np.roll(drawn, -place)[1:]
        apart = reference.separate(settings.mode, settings.scale, seen.pixels[point], seen.pixels[others])
        apart &= np.linalg.norm(seen.points_m[others] - seen.points_m[point], axis=1) >= APART_M
        if apart.any():
            both = int(point), int(others[apart.argmax()])
            pairs[tuple(sorted(both, key=lambda one: (*seen.pixels[one], one)))] = None  # left to right, as markers are
    return list(pairs)


class HostRows:
    """The rows that one host makes, in its order; each process that reads it plans by itself."""

    def __init__(
        self, sources: dict[str, Records], processor, config: config_module.Config, mine: tuple[int, ...],
        position: plan.Position,
    ):  # fmt: skip
        self.state = sources, processor, config, mine, position
        self.maker = SampleMaker(sources, processor, config)
        self.mine, self.local, self.first_step = mine, len(mine), position.step
        self.shape = row_shape(config.data, processor.config)
        planner = plan.Planner(sources, processor, config, self.shape, position)
        ahead = (config.data.prefetch_rows + config.data.read_threads) * max(1, config.data.workers)  # rows
        self.plans = plan.StepPlans(planner, ahead // self.local + 2)

    def __reduce__(self):
        return HostRows, self.state

    def __len__(self) -> int:
        return sys.maxsize // (2 * self.local)  # endless

    def __getitem__(self, index: int) -> dict:
        step, row = divmod(index, self.local)
        rows, position = self.plans[self.first_step + step]
        planned = rows[self.mine[row]]
        made = [self.maker(slot) for slot in planned]
        kept = [item for item in made if not isinstance(item, Dropped)]
        names = tuple(example.record_id for example, _ in kept)
        samples = [sample for _, sample in kept]
        arrays = packing.pack(samples, self.shape, self.maker.processor.config.patches_per_merged, names)
        used = np.sum([packing.size_of(sample) for sample in samples], axis=0) if samples else (0, 0, 0)
        dropped = tuple(item for item in made if isinstance(item, Dropped))
        slots = [slot for slot, item in zip(planned, made, strict=True) if not isinstance(item, Dropped)]
        sources = (tuple(slot.source for slot in slots),)
        counts = work.work_of(arrays, self.maker.processor.config.patch_slot_unit)
        about = About(names, sources, dropped, tuple(int(n) for n in used), counts, position)
        return {"arrays": arrays, "about": about}


class Batches:
    """Endless iterator of one host's `Rows` of each step; its state is the plan's position, for any host count."""

    def __init__(self, sources: dict[str, Records], processor, config: config_module.Config, mine: tuple[int, ...]):
        self.make_rows = lambda position: HostRows(sources, processor, config, mine, position)
        self.data, self.local = config.data, len(mine)
        self.reader = None
        self.set_state(dataclasses.asdict(plan.Position()))

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Rows:
        try:
            rows = next(self.reader)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # Grain's words for a worker that is gone
                raise
            raise InputError(
                "a process that makes rows has died", found=str(error).splitlines()[0], expected="one that works on",
                fix="start the run again; if it dies of memory, lower data.prefetch_rows or data.workers",
            ) from error  # fmt: skip
        self.position = rows.about.position
        return rows

    def get_state(self) -> dict:
        return dataclasses.asdict(self.position)

    def set_state(self, state: dict) -> None:
        self.close()
        self.position = plan.position_of(state)
        buffer = -(-self.data.prefetch_rows // max(1, self.data.workers))
        reading = grain.ReadOptions(num_threads=self.data.read_threads, prefetch_buffer_size=buffer)
        rows = grain.MapDataset.source(self.make_rows(self.position)).to_iter_dataset(reading)
        if self.data.workers:
            rows = rows.mp_prefetch(grain.MultiprocessingOptions(self.data.workers, max(1, buffer)))
        self.reader = iter(rows.batch(self.local, batch_fn=join_rows))

    def close(self) -> None:
        """Ends the worker processes."""
        if self.reader is not None:
            self.reader.close()


def row_shape(data: config_module.Data, sizes) -> batch_contract.RowShape:
    """Returns the row's sizes; `sizes` is the model's config."""
    window = sizes.patch_slot_unit
    if data.max_patches % window or not data.max_patches:
        raise InputError(
            "config: data.max_patches is not a whole number of windows", found=data.max_patches,
            expected=f"a multiple of {window}",
            fix=f"set --config.data.max_patches={-(-data.max_patches // window) * window}",
        )  # fmt: skip
    return batch_contract.RowShape(data.max_tokens, data.max_patches, data.max_answer_tokens, sizes.channels)


def training_batches(
    sources: dict[str, Records], processor, config: config_module.Config, rows: Sequence[int] | None = None
) -> Batches:
    """Returns this host's `Rows` of each step.

    Args:
      sources: of `open_sources`.
      processor: of the model's family, from a Hugging Face folder.
      config: of the run.
      rows: numbers of the global batch's rows that this host makes, as `sharding.host_rows` gives them; None: all.

    Raises:
      InputError: data.max_patches is not in whole windows.
    """
    return Batches(sources, processor, config, tuple(range(config.data.global_batch_rows) if rows is None else rows))


def join_rows(rows: Sequence[dict]) -> Rows:
    """Returns one `Rows` with a B axis."""
    abouts = [row["about"] for row in rows]
    about = About(
        tuple(name for one in abouts for name in one.record_ids),
        tuple(names for one in abouts for names in one.sources),
        tuple(drop for one in abouts for drop in one.dropped),
        tuple(sum(numbers) for numbers in zip(*(one.used for one in abouts), strict=True)),
        {name: sum(one.work[name] for one in abouts) for name in work.COUNTS},
        abouts[-1].position,
    )
    return Rows(packing.stack([row["arrays"] for row in rows]), about)


@dataclasses.dataclass(frozen=True)
class Questions:
    """What evaluation asks about one image."""

    examples: tuple[transforms.Example, ...]  # of one question each
    excluded: int  # points that were no candidates, because the marker does not fit
    short: int  # questions that the image had no point left for, or no second image


def evaluation_questions(records: Records, processor, config: config_module.Config) -> Iterator[Questions]:
    """Yields the questions of each image of the evaluation set, spread evenly, without crop, in a fixed order.

    Points are drawn without replacement, by (eval.seed, image); in official geometry, as the release draws them.
    Nothing is substituted: what cannot be asked is counted.
    """
    settings, data, limits = config.eval, config.data, limits_of(processor)
    task = tasks.TASKS[settings.task]
    draw = _official_draw if data.geometry.mode == "official" and task.points == 1 else _even_draw
    order, points_of = draw(records, settings)

    def ask_image(place: int) -> Questions:
        looks = [transforms.look(records[order[place]], data, limits)]
        drawn, wanted = points_of(place, looks[0].usable)
        if task.images == 2:
            partner = plan.partner_of(records.index["scene"], order[place], 0.5)
            looks += [transforms.look(records[partner], data, limits)] if partner >= 0 else []
            paired = len(looks) == 2 and all(seen.centre_m is not None for seen in looks)
            moved = paired and np.linalg.norm(looks[1].centre_m - looks[0].centre_m) >= APART_M
            points = [()] if moved and wanted else []
        else:
            points = groups_of(looks[0], drawn, task.points, data.reference, wanted)
        chances = np.random.default_rng((settings.seed, order[place], 1)).random(len(points)).tolist()
        examples = tuple(
            transforms.example(looks, settings.task, [chosen], data, limits, [chance])
            for chosen, chance in zip(points, chances, strict=True)
        )
        return Questions(examples, int(np.sum(~looks[0].usable)), wanted - len(examples))

    reading = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch_rows)
    yield from grain.MapDataset.range(len(order)).map(ask_image).to_iter_dataset(reading)


# A draw: (indices of the records to ask, (place among them, usable points) → (points in the order to ask, how many
# questions were wanted)).
Draw = tuple[Sequence[int], Callable[[int, np.ndarray], tuple[np.ndarray, int]]]


def _even_draw(records: Records, settings: config_module.Eval) -> Draw:
    order = np.random.default_rng(settings.seed).permutation(len(records))[: settings.samples].tolist()
    share, more = divmod(settings.samples, len(order))

    def points_of(place: int, usable: np.ndarray) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng((settings.seed, order[place]))
        return rng.permutation(np.flatnonzero(usable)), share + (place < more)

    return order, points_of


def _official_draw(records: Records, settings: config_module.Eval) -> Draw:
    """The release's questions; where it silently asks another one, this asks one less."""
    images = min(len(records), settings.samples)
    drawn = official.official_eval_indices(settings.samples, len(records[0].depth_m), settings.seed)

    def points_of(place: int, usable: np.ndarray) -> tuple[np.ndarray, int]:
        wanted = drawn[place::images]
        return np.array([point for point in wanted if point < len(usable) and usable[point]], int), len(wanted)

    return range(images), points_of
