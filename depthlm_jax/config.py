"""The typed sections behind every recipe: the only place where a default stands.

A recipe is an `ml_collections.ConfigDict` that starts from `default_config()`. `parse` reads it once into frozen
dataclasses and rejects what it does not know, naming the nearest field.
"""

import dataclasses
import keyword
import math
import re
import typing
from pathlib import Path

import ml_collections

from depthlm_jax import files
from depthlm_jax.config_errors import bad_value, unknown_key
from depthlm_jax.config_rules import CHOICES, HIGHER, LOWER, MARKERS, RANGES, TEXT_MODES
from depthlm_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank factors that train in place of the parameters, which are then frozen."""

    pattern: str = ""  # a regular expression that matches the whole path of each linear layer; empty: none
    rank: int = 16
    alpha: float = 32.0  # factors act with alpha / rank


@dataclasses.dataclass(frozen=True)
class Model:
    family: str = "qwen2_5_vl"
    hf_dir: str = ""  # Hugging Face folder with weights, config, tokenizer
    random_weights: bool = False  # where hf_dir is empty: start from nothing, with the sizes in hf_config
    hf_config: dict = dataclasses.field(default_factory=dict)  # content of config.json
    compute_dtype: str = "bfloat16"
    attention: str = "auto"  # splash on TPUs, cudnn on NVIDIA GPUs in bfloat16, else xla; or one of these by name
    remat: str = "full"  # what the backward pass computes again: full (every layer), attended (all but attention), dots
    # (all but matrix products), none
    unroll: int = 1  # layers in a turn of the loop over layers: more compile longer and may run faster
    seed: int = 0  # of random weights
    lora: Lora = Lora()


@dataclasses.dataclass(frozen=True)
class Source:
    path: str = ""  # a .jsonl file, or the folder of a TFDS data set; local, or gs://… and the like
    split: str = "train"  # TFDS split, slices allowed; not used by JSONL
    image_root: str = ""  # JSONL image paths start here; empty: the folder of the .jsonl
    depth_kind: str = "z"  # of records that do not say: z (along the principal axis) or ray (Euclidean)
    fov_degrees: float = 0.0  # horizontal field of view assumed for records without intrinsics; 0: they are an error


@dataclasses.dataclass(frozen=True)
class TrainSource(Source):
    weight: float = 1.0  # in the mixture, any scale; 0: off
    aspect_jitter: tuple[float, float] = (1.0, 1.0)  # images are squeezed in height by a factor drawn from this range


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A source's share is proportional to weight × min(records, size_cap)^size_exponent."""

    size_exponent: float = 0.0  # 0: the weights alone; 1: proportional to size; 1/τ: temperature τ
    size_cap: int = 0  # records beyond this number do not count; 0: all count


@dataclasses.dataclass(frozen=True)
class Geometry:
    mode: str = "corrected"  # or official: the release's geometry, bit for bit
    focal_px: float = 1000.0  # every image is resized to this focal length; 0: no resize but to the patch grid
    crop_width: tuple[int, int] = (1000, 1400)  # px after the resize, drawn uniformly in training; (0, 0): no crop
    crop_height: tuple[int, int] = (700, 1200)
    crop_position: str = "random"  # or centred
    flip: float = 0.0  # probability that a training image is mirrored left to right


@dataclasses.dataclass(frozen=True)
class Reference:
    """How a pixel is pointed at."""

    mode: str = "arrow"  # a marker drawn in the image (arrow, dot, cross, square), or text_raw, text_norm: coordinates
    scale: int = 1  # side in px of each square that the marker is made of
    color: str = "red"
    questions: int = 1  # about one image; more than one needs a text mode
    layout: str = "independent"  # several questions do not see one another; or conversation: each sees those before


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Weights of the questions; 0: never asked."""

    distance: float = 1.0
    axis_distance: float = 0.0
    speed: float = 0.0
    time: float = 0.0
    two_points: float = 0.0
    translation: float = 0.0


@dataclasses.dataclass(frozen=True)
class Data:
    sources: dict[str, TrainSource] = dataclasses.field(default_factory=lambda: {"main": TrainSource()})
    mixture: Mixture = Mixture()
    geometry: Geometry = Geometry()
    reference: Reference = Reference()
    tasks: Tasks = Tasks()
    label_kind: str = "z"  # which distance is meant: z, ray, or official (as the release's labels, mixed)
    camera_hint: str = "none"  # or intrinsics: told in the question; ray: the answer begins with the viewing ray
    global_batch_rows: int = 128  # rows of one optimizer step, over all hosts and micro-batches
    max_tokens: int = 2560  # T: token slots of a row
    max_patches: int = 9216  # P: patch slots of a row, padding of edge windows included
    max_answer_tokens: int = 48  # A: supervised positions of a row
    max_bad_records: int = 0  # bad records that a host skips and logs, from its start on, before training stops
    workers: int = 0  # processes of a host that make rows; 0: threads of the training process
    read_threads: int = 16  # of each process
    prefetch_rows: int = 32


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that train at a learning rate of their own."""

    pattern: str  # a regular expression that matches the whole '/'-path of each of them: "visual/.*"
    factor: float  # of the learning rate; 0: frozen


@dataclasses.dataclass(frozen=True)
class Optim:
    name: str = "adamw"  # or adafactor, lion, muon
    learning_rate: float = 1e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 0.1
    groups: dict[str, Group] = dataclasses.field(default_factory=dict)  # parameters in none have factor 1


@dataclasses.dataclass(frozen=True)
class Train:
    max_steps: int = 1000
    gradient_accumulation_steps: int = 1  # 0: as many as leave each device one row at a time
    accumulation_dtype: str = "float32"  # of the sum of gradients over them
    loss_on: str = "answer"  # or official: every text token, the prompt's too
    digit_weight: float = 1.0  # weight of the answer's digits in the loss
    seed: int = 0  # of data order, crops and query points
    save_steps: int = 500
    keep_last: int = 2  # checkpoints on disk; of one, a damaged disk leaves nothing
    keep_every: int = 0  # steps, whose multiples are kept as well; 0: none
    keep_best: str = ""  # SET/METRIC, such as rooms/delta1: the checkpoint that was best in it is kept as well
    logging_steps: int = 10
    compilation_cache: str = ""  # folder where compiled programs are kept for the next start; empty: they are not


@dataclasses.dataclass(frozen=True)
class Faults:
    """When a run stops, so that a scheduler may start it again, instead of going on or waiting."""

    skipped_steps: int = 5  # in a row, that changed nothing because loss or gradient was not finite
    failed_saves: int = 3  # in a row
    silent_seconds: int = 1800  # without progress of a process; 0: it may wait for ever
    start_seconds: int = 600  # that processes wait for each other when they connect


@dataclasses.dataclass(frozen=True)
class EvalSet(Source):
    """A set that is evaluated while training, and by `evaluate`; all else as in Eval."""

    samples: int = 256
    every_steps: int = 0  # evaluated whenever so many steps are done, and after the last one; 0: then alone


@dataclasses.dataclass(frozen=True)
class Eval:
    source: Source = Source()  # what `evaluate` asks about
    sets: dict[str, EvalSet] = dataclasses.field(default_factory=dict)
    task: str = "distance"
    samples: int = 512  # (image, point) pairs, spread evenly over the images
    batch_rows: int = 16
    max_new_tokens: int = 64
    answer_prefix: str = ""  # how answers are made to begin; the number that follows is then the whole answer
    expectation: bool = False  # also the mean of all numbers that may follow answer_prefix, by their probabilities
    seed: int = 42


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = -1  # copies of the parameters; -1: all devices that the other axes leave
    fsdp: int = 1  # devices that share the parameters, and have rows of their own
    tensor: int = 1  # devices that share each layer, and its rows
    replica: int = 0  # copies on TPU slices that are joined by a slower network; 0: one on each slice


@dataclasses.dataclass(frozen=True)
class Track:
    tensorboard: bool = True  # event files in workdir/tensorboard
    wandb_project: str = ""  # of Weights & Biases, whose own environment variables say who and where; empty: none


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    data: Data = Data()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    mesh: Mesh = Mesh()
    faults: Faults = Faults()
    track: Track = Track()


USERS = {"sources", "groups", "sets", "hf_config"}  # dicts whose keys are the user's
NAMED = {"data.sources": "source", "optim.groups": "group", "eval.sets": "evaluation set"}  # names are the user's


def default_config() -> ml_collections.ConfigDict:
    """Returns a recipe with every field at its default, to be changed by `get_config`."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    config.model.hf_config = ml_collections.ConfigDict()
    return config


def sources(table: dict[str, dict]) -> ml_collections.ConfigDict:
    """Returns data.sources of a recipe: {"nuscenes": {"path": "nuscenes.jsonl", "weight": 0.1}, …}.

    Raises:
      InputError: a name that is none, or fields that are not in a dict.
    """
    return _named("data.sources", TrainSource, table)


def groups(table: dict[str, dict]) -> ml_collections.ConfigDict:
    """Returns optim.groups of a recipe: {"vision": {"pattern": "visual/.*", "factor": 0.1}, …}; raises as `sources`."""
    return _named("optim.groups", Group, table)


def eval_sets(table: dict[str, dict]) -> ml_collections.ConfigDict:
    """Returns eval.sets of a recipe: {"rooms": {"path": "rooms.jsonl", "every_steps": 500}, …}; raises as `sources`."""
    return _named("eval.sets", EvalSet, table)


def _named(path: str, section: type, table: dict[str, dict]) -> ml_collections.ConfigDict:
    _check_named(path, table)
    default = {f.name: f.default for f in dataclasses.fields(section) if f.default is not dataclasses.MISSING}
    return ml_collections.ConfigDict({name: default | fields for name, fields in table.items()})


def _check_named(path: str, table: dict) -> None:
    for name, fields in table.items():
        if not (isinstance(name, str) and name.isidentifier()) or keyword.iskeyword(name):
            raise InputError(
                f"config: bad name of a {NAMED[path]} in {path}", found=repr(name), fix="rename it in the recipe",
                expected=f"letters, digits and _, no digit first: it is part of --config.{path}.NAME.…",
            )  # fmt: skip
        if not isinstance(fields, dict):
            raise bad_value(f"{path}.{name}", f"{fields!r} of type {type(fields).__name__}", "a dict of its fields")


def parse(recipe: ml_collections.ConfigDict) -> Config:
    """Returns the frozen sections of a recipe.

    Raises:
      InputError: an unknown or missing field, a value of the wrong type or outside its choices; each named by path.
    """
    config = _parse_section(Config, recipe.to_dict(), "")
    _check_questions(config)
    _check_answers(config.eval)
    _check_best(config)
    return config


def _check_questions(config: Config) -> None:
    reference = config.data.reference
    if reference.questions > 1 and reference.mode in MARKERS:
        raise InputError(
            "config: several questions about one image need coordinates",
            found=f"data.reference.mode={reference.mode}, questions={reference.questions}: which marker is meant?",
            expected=f"mode {' or '.join(TEXT_MODES)}",
            fix="set --config.data.reference.mode=text_norm, or --config.data.reference.questions=1",
        )  # fmt: skip
    if reference.questions > 1 and reference.layout == "independent" and config.train.loss_on == "official":
        raise InputError(
            "config: train.loss_on=official has no meaning for independent questions", found="a question's first token "
            "does not follow the text before it", expected="one question, or layout conversation",
            fix="set --config.train.loss_on=answer, or --config.data.reference.layout=conversation",
        )  # fmt: skip


def _check_answers(settings: Eval) -> None:
    if settings.expectation and not settings.answer_prefix:
        raise InputError(
            "config: eval.expectation needs eval.answer_prefix", found="answer_prefix='', expectation=True",
            expected="how an answer begins up to its number, such as '<think> The point is around '",
            fix="set --config.eval.answer_prefix, or --config.eval.expectation=false",
        )  # fmt: skip


def _check_best(config: Config) -> None:
    known = [f"{name}/{metric}" for name in config.eval.sets for metric in (*HIGHER, *LOWER)]
    if config.train.keep_best and config.train.keep_best not in known:
        raise InputError(
            "config: train.keep_best is measured nowhere", found=repr(config.train.keep_best),
            expected=f"one of {', '.join(known)}" if known else "SET/METRIC, SET being one of eval.sets; there is none",
            fix="set --config.train.keep_best, or add that set to eval.sets in the recipe",
        )  # fmt: skip


def _parse_section(section: type, values: dict, path: str):
    if type(values) is not dict:
        raise bad_value(path.rstrip("."), f"{values!r} of type {type(values).__name__}", "a section")
    known = typing.get_type_hints(section)
    for name in values:
        if name not in known:
            raise unknown_key(f"{path}{name}", [f"{path}{other}" for other in known])
    missing = sorted(known.keys() - values.keys())
    if missing:
        raise InputError(
            f"config: {path}{missing[0]} is missing", found=f"fields {sorted(values)}", expected=sorted(known),
            fix="add it; a recipe that starts from depthlm_jax.config.default_config() has every default",
        )  # fmt: skip
    return section(**{name: _parse_value(known[name], value, f"{path}{name}") for name, value in values.items()})


def _parse_value(kind, value, path: str):
    if dataclasses.is_dataclass(kind):
        return _parse_section(kind, value, f"{path}.")
    if typing.get_origin(kind) is dict:
        least = ", at least one" if path == "data.sources" else ""
        if type(value) is not dict or (least and not value):
            raise bad_value(path, f"{value!r} of type {type(value).__name__}", f"named sections{least}")
        section = typing.get_args(kind)[1]
        _check_named(path, value)
        return {name: _parse_section(section, fields, f"{path}.{name}.") for name, fields in value.items()}
    if typing.get_origin(kind) is tuple:
        return _parse_range(typing.get_args(kind)[0], value, path)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise bad_value(path, f"{value!r} of type {type(value).__name__}", kind.__name__)
    rule = re.sub(rf"^({'|'.join(NAMED)})\.[^.]+", r"\1.*", path)
    if rule in CHOICES and value not in CHOICES[rule]:
        raise bad_value(path, repr(value), " or ".join(CHOICES[rule]))
    low, high = RANGES.get(rule, (-math.inf, math.inf))
    if isinstance(value, (int, float)) and not low <= value <= high:
        raise bad_value(path, value, f"{low} to {high}")
    return value


def _parse_range(kind: type, value, path: str) -> tuple:
    """Returns (smallest, largest)."""
    fits = isinstance(value, (tuple, list)) and len(value) == 2 and {type(v) for v in value} <= {int, kind}
    low, numbers = (0, "two whole numbers") if kind is int else (0.1, "two numbers")
    if not (fits and low <= value[0] <= value[1] < math.inf):
        raise bad_value(path, value, f"{numbers} (smallest, largest), {low} ≤ smallest ≤ largest")
    return tuple(kind(v) for v in value)


def flatten(config: Config) -> dict[str, object]:
    """Returns {'train.seed': 0, …}: one entry a leaf."""
    leaves = {}

    def walk(node: object, path: str):
        if isinstance(node, dict):
            for name, value in node.items():
                walk(value, f"{path}.{name}" if path else name)
        else:
            leaves[path] = list(node) if isinstance(node, tuple) else node

    walk(dataclasses.asdict(config), "")
    return leaves


def save(config: Config, file: Path) -> None:
    """Writes the config as JSON, whole or not at all."""
    files.write_json(file, dataclasses.asdict(config))


def load(file: Path) -> Config:
    """Returns the config that `save` wrote."""
    return from_dict(files.read_json(file, "restore the file, or give another --workdir"))


def from_dict(values: dict) -> Config:
    """Returns the config whose nested dict this is; fields that it was saved without have their defaults."""
    return _parse_section(Config, _completed(dataclasses.asdict(Config()), values), "")


def _completed(default: dict, values: dict) -> dict:
    nested = {n for n in default.keys() & values.keys() - USERS if type(default[n]) is type(values[n]) is dict}
    return default | values | {name: _completed(default[name], values[name]) for name in nested}
