"""README.md of an exported folder: what the model is, how to ask it, what it scored, where it comes from."""

import dataclasses
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import HFValidationError, validate_repo_id

from depthlm_jax import config as config_module
from depthlm_jax import config_rules, files, log, snippet
from depthlm_jax.data import reference, tasks
from depthlm_jax.errors import InputError
from depthlm_jax.eval.report import UNITS
from depthlm_jax.run import Run

FILE = "README.md"
PUBLISHED = {  # what training may begin from → fields of its licence in a card
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "license": "other", "license_name": "qwen-research",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct/blob/main/LICENSE",
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {"license": "apache-2.0"},
    "Qwen/Qwen2.5-VL-32B-Instruct": {"license": "apache-2.0"},
    "Qwen/Qwen2.5-VL-72B-Instruct": {
        "license": "other", "license_name": "qwen",
        "license_link": "https://huggingface.co/Qwen/Qwen2.5-VL-72B-Instruct/blob/main/LICENSE",
    },
    "mistral-community/pixtral-12b": {"license": "apache-2.0"},
    "facebook/DepthLM": {
        "license": "other", "license_name": "fair-noncommercial-research-license",
        "license_link": "https://huggingface.co/facebook/DepthLM",
    },
}  # fmt: skip
TAGS = ["depth-estimation", "monocular-depth-estimation", "metric-depth", "depthlm", "vision-language-model"]
METRICS = {  # name in metrics.json → name in the card
    "delta1": "δ1", "delta2": "δ2", "delta3": "δ3", "delta1_per_image": "δ1, mean over images", "abs_rel": "AbsRel",
    "sq_rel": "SqRel", "rmse": "RMSE", "rmse_log": "RMSE of log", "log10": "log10", "silog": "SILog",
    "parse_failure_rate": "share of answers without a number", "distinct": "different numbers in 100 answers",
    "n": "questions",
}  # fmt: skip
GEOMETRY = {
    "corrected": "each axis by its own factor, then to the nearest multiple of {grid} px, at least one; a pixel x "
    "moves to (x + 0.5) · factor − 0.5, rounded to the nearest",
    "official": "both axes by the factor of fx; sides and the pixel's coordinates are cut off to whole numbers; the "
    "image processor resizes once more",
}  # fmt: skip
LABEL = {
    "z": "along the principal axis (z-depth)",
    "ray": "from the camera's centre to the point (Euclidean, along the ray)",
    "official": "as in DepthLM's release: along the principal axis or the ray, by data set",
}
HINT = {
    "none": "the model is told nothing about the camera; it relies on the focal length of the image",
    "intrinsics": "the question tells the focal lengths and the principal point of the resized image",
    "ray": "the answer begins with the viewing ray of the point: x right, y down, z forward",
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a card tells."""

    config: config_module.Config  # of the run
    step: int
    grid_px: int  # sides of the model's images are multiples of it
    base_model: str | None = None  # hub id; None: random weights, or not known
    license: dict[str, str] = dataclasses.field(default_factory=dict)  # fields of the front matter; empty: not known
    scores: dict | None = None  # content of the metrics.json that `evaluate` wrote
    hub_id: str = ""  # where it is to be published, if that is known

    @property
    def name(self) -> str:
        return self.hub_id.split("/")[-1] or f"DepthLM-{(self.base_model or self.config.model.family).split('/')[-1]}"

    @property
    def evaluated(self) -> dict:
        """The settings that the scores belong to."""
        return (self.scores or {}).get("eval") or dataclasses.asdict(self.config.eval)


def write(
    run: Run, step: int, folder: Path, base_model: str, license: str, evaluation_file: Path | None, hub_id: str = ""
) -> None:
    """Writes README.md into an export of the run.

    Args:
      run: whose parameters are exported.
      step: of the parameters.
      folder: of the export.
      base_model: hub id of the folder that training began from; '': told from the name of model.hf_dir, if it can be.
      license: as the hub spells it; '': that of the base model, if it is known.
      evaluation_file: metrics.json; None: the one in the run's folder, if it is there and of this step.
      hub_id: where the folder is to be published; '': not known.

    Raises:
      InputError: a bad name of a base model or licence; scores of another step.
    """
    base = base_of(run.config.model, base_model)
    facts = Facts(
        run.config, step, run.processor.config.grid_px, base, _license(base, license),
        _read_scores(run.workdir, step, evaluation_file), hub_id,
    )  # fmt: skip
    (folder / FILE).write_text(text(facts), encoding="utf-8")


def base_of(model: config_module.Model, given: str) -> str | None:
    """Returns the hub id of what training began from; None, with a warning, if it is not known.

    Raises:
      InputError: `given` is no hub id, or there is no base model.
    """
    if given:
        check_hub_id(given, "--base_model")
        if not model.hf_dir:
            raise InputError(
                "--base_model: this run has none", found=given, expected="nothing: it began with random weights",
                fix="leave --base_model away",
            )  # fmt: skip
        return given
    if not model.hf_dir:
        return None
    place = Path(model.hf_dir)
    for hub_id in PUBLISHED:
        if place.name == hub_id.split("/")[1] or f"models--{hub_id.replace('/', '--')}" in place.parts:
            return hub_id
    log.say(f"warning: the card names no base model: none is called {place.name!r}; give --base_model=USER/NAME")
    return None


def check_hub_id(hub_id: str, flag: str) -> None:
    """Raises InputError unless it is USER/NAME as the hub allows it."""
    try:
        validate_repo_id(hub_id)
        if hub_id.count("/") != 1:
            raise HFValidationError("no user or organisation in front of the name")
    except HFValidationError as error:
        raise InputError(
            f"{flag}: not a name on the hub", found=f"{hub_id!r}: {error}", expected="USER/NAME", fix=f"correct {flag}"
        ) from None


def _license(base: str | None, given: str) -> dict[str, str]:
    if given and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", given):
        raise InputError(
            "--license: not a licence as the hub spells it", found=repr(given), expected="apache-2.0, cc-by-nc-4.0, …",
            fix="take its identifier from hf.co/docs/hub/repositories-licenses",
        )  # fmt: skip
    known = {"license": given} if given else PUBLISHED.get(base, {})
    if not known:
        log.say("warning: the card names no licence; give --license=IDENTIFIER")
    return known


def _read_scores(workdir: Path, step: int, given: Path | None) -> dict | None:
    file = given or workdir / "evaluation" / "metrics.json"
    if given is None and not file.exists():
        return None
    scores = files.read_json(file, "give --evaluation=metrics.json as evaluate writes it")
    if scores.get("step") == step and "model" in scores:
        return scores
    found = f"scores of step {scores.get('step')}"
    if given:
        raise InputError(
            f"{file}: not the scores of what is exported", found=found, expected=f"scores of step {step}",
            fix="run evaluate again, and give the metrics.json that it writes",
        )  # fmt: skip
    log.say(f"warning: the card has no results: {file} has {found}, this is step {step}; run evaluate again")
    return None


def text(facts: Facts) -> str:
    """Returns the whole card: front matter and Markdown."""
    config = facts.config
    origin = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else (
        "a vision language model" if config.model.hf_dir else "random weights"
    )  # fmt: skip
    program = snippet.program(config, facts.hub_id or ".")
    body = [
        f"# {facts.name}",
        "A vision language model that says in words how far away a pixel of a photograph is, in metres. "
        f"Trained from {origin} with plain text fine-tuning, the method of "
        "[DepthLM](https://arxiv.org/abs/2509.25413), by depthlm_jax.",
        "## How to ask",
        _table(("", ""), _asking(facts)),
        *(("## Usage", f"```python\n{program}```") if program else ()),
        "## Results",
        _results(facts),
        "## Training",
        _table(("", ""), _training(facts, origin)),
        "## Licence",
        _licence_note(facts),
    ]
    return f"---\n{_front_matter(facts)}\n---\n\n" + "\n\n".join(body) + "\n"


def _front_matter(facts: Facts) -> str:
    """Source: the hub's model card specification."""
    names = [name for name in _sources(facts.config) if re.fullmatch(r"[\w.-]+", name, re.ASCII)]
    card = huggingface_hub.ModelCardData(
        **facts.license, base_model=facts.base_model,
        base_model_relation="finetune" if facts.base_model else None, pipeline_tag="image-text-to-text",
        library_name="transformers", tags=TAGS, datasets=names or None, model_name=facts.name,
        eval_results=_eval_results(facts) or None,
    )  # fmt: skip
    if not card.eval_results:
        card.pop("model_name")
    return card.to_yaml()


def _eval_results(facts: Facts) -> list[huggingface_hub.EvalResult]:
    if facts.scores is None or not facts.evaluated["source"]["path"]:
        return []
    source, task = facts.evaluated["source"], facts.evaluated["task"]
    name = _set_name(source["path"])
    split = None if source["path"].endswith(".jsonl") else source["split"]
    return [
        huggingface_hub.EvalResult(
            task_type="depth-estimation", task_name=f"Metric depth of a pixel ({task})", dataset_type=name,
            dataset_name=name, dataset_split=split, metric_type=metric, metric_name=shown,
            metric_value=facts.scores["model"][metric],
        )
        for metric, shown in METRICS.items()
        if metric != "n" and facts.scores["model"].get(metric) is not None
    ]  # fmt: skip


def _set_name(path: str) -> str:
    """Returns what a source's path calls it.

    >>> _set_name("gs://bucket/nyuv2/test.jsonl"), _set_name("records/ibims1/1.0.0"), _set_name("/data/eth3d")
    ('test', 'ibims1', 'eth3d')
    """
    place = Path(path)
    if place.suffix == ".jsonl":
        return place.stem
    return place.parent.name if re.fullmatch(r"\d+\.\d+\.\d+", place.name) else place.name


def _sources(config: config_module.Config) -> dict[str, config_module.TrainSource]:
    """Returns the sources that are trained on, by name; the one that a recipe did not name, by that of its files."""
    return {
        _set_name(source.path) or name if name == "main" else name: source
        for name, source in config.data.sources.items()
        if source.weight
    }


def _asking(facts: Facts) -> list[tuple[str, str]]:
    data = facts.config.data
    focal_px, mode = data.geometry.focal_px, data.reference.mode
    wanted = f"to a focal length of {focal_px:g} px" if focal_px else "to no other focal length than it has"
    scale, (red, green, blue) = data.reference.scale, config_rules.COLORS[data.reference.color]
    squares = ", ".join(str(offset) for offset in reference.MARKERS.get(mode, ()))
    if mode in config_rules.MARKERS:
        pointed = (
            f"{data.reference.color} {mode}, rgb({red}, {green}, {blue}), drawn last, on the resized image: a square "
            f"of {scale} × {scale} px around pixel (x, y) + {scale} · (dx, dy) for each (dx, dy) of {squares}"
        )
    else:
        pointed = "none: the question tells the pixel's coordinates in the resized image, (0, 0) the top left pixel" + (
            ", normalised: nx = ⌊(2x + 1) · 1000 / width⌋, ny likewise" if mode == "text_norm" else ""
        )
    first, *others = snippet.trained_tasks(facts.config)
    return [
        ("question", f"`{snippet.question(first, data)}`"),
        *((f"also, for example: {task}", f"`{snippet.question(task, data)}`") for task in others),
        ("messages", "one user turn, the image before the question; no system turn, a chat template may add its own"),
        ("image", f"undistorted, whole, resized {wanted}: {GEOMETRY[data.geometry.mode].format(grid=facts.grid_px)}"),
        ("marker", pointed),
        ("answer", f"`{_escaped(tasks.answer_text(2.35))}`, decoded greedily without repetition penalty"),
        ("distance", f"in metres, {LABEL[data.label_kind]}"),
        ("camera", HINT[data.camera_hint]),
    ]


def _results(facts: Facts) -> str:
    if facts.scores is None:
        return "Not evaluated."
    scores, task = facts.scores, facts.evaluated["task"]
    unit, constant = UNITS[task], scores["best_constant"]
    columns = {"model": scores["model"], f"best constant answer ({constant['answer']:.2f} {unit})": constant}
    if scores.get("expectation"):
        columns["model, mean over all numbers by their probabilities"] = scores["expectation"]
    names = METRICS | {"rmse": f"RMSE ({unit})"}
    rows = [(shown, *(_number(column.get(name)) for column in columns.values())) for name, shown in names.items()]
    prefix = facts.evaluated.get("answer_prefix")
    decoding = f"greedy decoding of the number after {prefix!r}" if prefix else "greedy decoding"
    name, left_out = _set_name(facts.evaluated["source"]["path"]) or "A set without a name", scores["excluded_points"]
    return (
        f"{name}, task {task}, {decoding}. δk is the share of answers within a factor of 1.25^k of the truth; an "
        "answer without a number is wrong in every δ and left out of the errors. Not asked: "
        f"{scores['questions_not_asked']} questions, {left_out} points that the marker does not fit to."
        f"\n\n{_table(('', *columns), rows)}"
    )


def _training(facts: Facts, origin: str) -> list[tuple[str, str]]:
    config = facts.config
    data, optim = config.data, config.optim
    crop = "none"
    if (0, 0) not in (data.geometry.crop_width, data.geometry.crop_height):
        crop = "{}–{} × {}–{} px, ".format(*data.geometry.crop_width, *data.geometry.crop_height)
        crop += f"{data.geometry.crop_position}"
    exponent = data.mixture.size_exponent
    shares = ", ".join(f"{name}: {source.weight:g}" for name, source in _sources(config).items())
    return [
        ("from", origin),
        ("steps", f"{facts.step} of {config.train.max_steps}"),
        ("batch", f"{data.global_batch_rows} rows of up to {data.max_tokens} tokens, samples packed"),
        ("learning rate", f"{optim.learning_rate:g}, warm-up over {optim.warmup_ratio:g} of the steps"),
        ("loss", f"cross-entropy on {'the answer' if config.train.loss_on == 'answer' else 'every text token'}"),
        ("sources: weights", shares + (f", each × records^{exponent:g}" if exponent else "")),
        ("crops", crop),
        ("questions an image", str(data.reference.questions)),
        *_parts_trained(config),
    ]


def _parts_trained(config: config_module.Config) -> list[tuple[str, str]]:
    """Returns what was not trained as a whole or not at the one learning rate; nothing: all parameters were."""
    lora = config.model.lora
    rows = [("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on `{lora.pattern}`")] if lora.pattern else []
    groups = [f"`{group.pattern}`: {group.factor:g}" for group in config.optim.groups.values()]
    return [*rows, *([("learning-rate factors, 0 is frozen", ", ".join(groups))] if groups else [])]


def _licence_note(facts: Facts) -> str:
    named = facts.license.get("license_name") or facts.license.get("license")
    first = f"Of the weights: {named}." if named else "No licence was named for these weights."
    return (
        f"{first} Licences of the data sets that it was trained on ({', '.join(_sources(facts.config))}) may bind what "
        "is derived from them, too: many allow research only. Check them before you use or share this model."
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _escaped(words: str) -> str:
    return words.replace("\n", "\\n")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
