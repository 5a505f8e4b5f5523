"""Records → samples → rows → batches.

Row r of the run is a function of (seed, r): Grain's shuffle, repeat and random_map are evaluated at any index. Step s
trains on rows s·R … s·R + R − 1, of which every host makes its own, so the order does not depend on the number of hosts
or threads, and the position to resume from is one number.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from depthlm_jax import batch as batch_contract
from depthlm_jax import config as config_module
from depthlm_jax.data import packing, transforms
from depthlm_jax.data.official import official_eval_indices
from depthlm_jax.data.records import Records
from depthlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A record that gave no sample."""

    record_id: str
    reason: str
    bad: bool  # unreadable or invalid, as against: no labelled point inside the crop


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of the batch contract, and what they were made of."""

    arrays: dict[str, np.ndarray]
    record_ids: tuple[str, ...]
    dropped: tuple[Dropped, ...]


@dataclasses.dataclass(frozen=True)
class SampleMaker:
    """(index of a record, random numbers) → (example, sample), or why there is none."""

    records: Records
    processor: object  # of the model's family
    config: config_module.Config

    @property
    def limits(self) -> transforms.Limits:
        sizes = self.processor.config
        return transforms.Limits(sizes.grid_px, sizes.min_pixels, sizes.max_pixels)

    def __call__(self, index: int, rng: np.random.Generator):
        example = self.example(index, rng)
        return example if isinstance(example, Dropped) else (example, self.encode(example))

    def example(self, index: int, rng: np.random.Generator) -> "transforms.Example | Dropped":
        """Returns a question about a uniformly drawn usable point of the record."""
        data = self.config.data
        try:
            seen = transforms.look(self.records[index], data, self.limits, rng)
            usable = np.flatnonzero(seen.usable)
            if not len(usable):
                return Dropped(seen.record_id, "no labelled point inside the crop with room for the marker", bad=False)
            return transforms.ask(seen, int(rng.choice(usable)), data, self.limits)
        except InputError as error:
            return Dropped(f"record {index}", str(error), bad=True)

    def encode(self, example: transforms.Example) -> batch_contract.Sample:
        train = self.config.train
        return self.processor.encode(
            [example.image], example.question, example.answer, loss_on=train.loss_on, digit_weight=train.digit_weight
        )


@dataclasses.dataclass(frozen=True)
class HostRows:
    """The rows that one host makes, in its order."""

    rows: grain.MapDataset
    per_step: int  # of all hosts
    host: int
    hosts: int
    first_step: int

    def __len__(self) -> int:
        return sys.maxsize // self.per_step  # endless

    def __getitem__(self, index: int) -> Rows:
        local = self.per_step // self.hosts
        step, row = divmod(index, local)
        return self.rows[(self.first_step + step) * self.per_step + self.host * local + row]


class Batches:
    """Endless iterator of one host's `Rows` of each step; its state is the number of steps, for any host count."""

    def __init__(self, rows: grain.MapDataset, data: config_module.Data, host: int, hosts: int):
        self.rows, self.data, self.host, self.hosts = rows, data, host, hosts
        self.set_state({"step": 0})

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Rows:
        rows = next(self.reader)
        self.step += 1
        return rows

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        data, self.step = self.data, state["step"]
        reading = grain.ReadOptions(num_threads=data.read_threads, prefetch_buffer_size=data.prefetch_rows)
        mine = HostRows(self.rows, data.global_batch_rows, self.host, self.hosts, self.step)
        rows = grain.MapDataset.source(mine).to_iter_dataset(reading)
        self.reader = iter(rows.batch(data.global_batch_rows // self.hosts, batch_fn=join_rows))


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


def training_samples(records: Records, processor, config: config_module.Config) -> grain.MapDataset:
    """Returns the endless sequence of (example, sample) or `Dropped`, with random access; a new order each epoch."""
    order = grain.MapDataset.range(len(records)).seed(config.train.seed).shuffle().repeat()
    return order.random_map(SampleMaker(records, processor, config))


def training_batches(
    records: Records, processor, config: config_module.Config, host: int = 0, hosts: int = 1
) -> Batches:
    """Returns this host's `Rows` of each step.

    Args:
      records: of the training source.
      processor: of the model's family, from a Hugging Face folder.
      config: of the run.
      host: number of this process.
      hosts: number of processes.

    Raises:
      InputError: hosts do not divide data.global_batch_rows, or data.max_patches is not in whole windows.
    """
    data = config.data
    if data.global_batch_rows % hosts:
        raise InputError(
            "config: data.global_batch_rows cannot be shared", found=f"{data.global_batch_rows} rows, {hosts} hosts",
            expected=f"a multiple of {hosts}", fix="set --config.data.global_batch_rows",
        )  # fmt: skip
    shape, merged = row_shape(data, processor.config), processor.config.patches_per_merged

    def pack_row(items: Sequence) -> Rows:
        kept = [item for item in items if not isinstance(item, Dropped)]
        names = [example.record_id for example, _ in kept]
        arrays = packing.pack([sample for _, sample in kept], shape, merged, names)
        return Rows(arrays, tuple(names), tuple(item for item in items if isinstance(item, Dropped)))

    rows = training_samples(records, processor, config).batch(data.samples_per_row, batch_fn=pack_row)
    return Batches(rows, data, host, hosts)


def join_rows(rows: Sequence[Rows]) -> Rows:
    """Returns one `Rows` with a B axis."""
    return Rows(
        packing.stack([row.arrays for row in rows]),
        tuple(name for row in rows for name in row.record_ids),
        tuple(drop for row in rows for drop in row.dropped),
    )


@dataclasses.dataclass(frozen=True)
class Questions:
    """What evaluation asks about one image."""

    examples: tuple[transforms.Example, ...]
    excluded: int  # points that were no candidates, because the marker does not fit
    short: int  # questions that the image had no point left for


def evaluation_questions(records: Records, processor, config: config_module.Config) -> Iterator[Questions]:
    """Yields the questions of each image of the evaluation set, spread evenly, without crop, in a fixed order.

    Points are drawn without replacement, by (eval.seed, image); in official geometry, as the release draws them.
    Nothing is substituted: what cannot be asked is counted.
    """
    maker, settings = SampleMaker(records, processor, config), config.eval
    draw = _official_draw if config.data.geometry.mode == "official" else _even_draw
    order, points_of = draw(records, settings)

    def ask_image(place: int) -> Questions:
        seen = transforms.look(records[order[place]], config.data, maker.limits, None)
        points, wanted = points_of(place, seen.usable)
        examples = tuple(transforms.ask(seen, int(point), config.data, maker.limits) for point in points)
        return Questions(examples, int(np.sum(~seen.usable)), wanted - len(examples))

    reading = grain.ReadOptions(num_threads=config.data.read_threads, prefetch_buffer_size=config.data.prefetch_rows)
    yield from grain.MapDataset.range(len(order)).map(ask_image).to_iter_dataset(reading)


# A draw: (indices of the records to ask, (place among them, usable points) → (points to ask, how many were wanted)).
Draw = tuple[Sequence[int], Callable[[int, np.ndarray], tuple[Sequence[int], int]]]


def _even_draw(records: Records, settings: config_module.Eval) -> Draw:
    order = np.random.default_rng(settings.seed).permutation(len(records))[: settings.samples].tolist()
    share, more = divmod(settings.samples, len(order))

    def points_of(place: int, usable: np.ndarray) -> tuple[Sequence[int], int]:
        wanted = share + (place < more)
        rng = np.random.default_rng((settings.seed, order[place]))
        return rng.permutation(np.flatnonzero(usable))[:wanted], wanted

    return order, points_of


def _official_draw(records: Records, settings: config_module.Eval) -> Draw:
    """The release's questions; where it silently asks another one, this asks one less."""
    images = min(len(records), settings.samples)
    drawn = official_eval_indices(settings.samples, len(records[0].depth_m), settings.seed)

    def points_of(place: int, usable: np.ndarray) -> tuple[Sequence[int], int]:
        wanted = drawn[place::images]
        return [point for point in wanted if point < len(usable) and usable[point]], len(wanted)

    return range(images), points_of
