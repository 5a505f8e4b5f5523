"""export: parameters → a Hugging Face folder, and from there to the hub."""

from pathlib import Path

from absl import flags

from depthlm_jax import hub, log, model_card, release
from depthlm_jax import run as runs
from depthlm_jax.cli import command
from depthlm_jax.models import registry

OF_THE_CARD = ("base_model", "license", "evaluation")


def define_flags(values: flags.FlagValues) -> None:
    command.define_path(values, "workdir", "folder of the run whose latest checkpoint is written")
    command.define_path(values, "hf_dir", "instead of --workdir: a Hugging Face folder to write again")
    command.define_path(values, "output", "the folder to write")
    command.define_text(values, "base_model", "USER/NAME on the hub of what training began from, for the model card; "
                        "else told from the name of model.hf_dir")  # fmt: skip
    command.define_text(values, "license", "of the weights, for the model card, as the hub spells it: apache-2.0; else "
                        "that of the base model")  # fmt: skip
    command.define_path(values, "evaluation", "metrics.json for the model card; else the one in WORKDIR/evaluation")
    command.define_text(values, "push_to_hub", "USER/NAME on the hub to upload the folder to; `hf auth login` first")
    flags.DEFINE_bool("adapter", False, "of a run with low-rank factors: write them alone, as a folder that peft loads",
                      flag_values=values)  # fmt: skip
    flags.DEFINE_bool("private", False, "a repository that --push_to_hub makes is private", flag_values=values)


def run(values: flags.FlagValues) -> dict:
    output = command.read_path(values, "output")
    _check(values)
    if values.hf_dir:
        source = command.read_path(values, "hf_dir")
        family = registry.family_of(source)
        release.refuse_foreign(output)
        _make_repository(values)
        release.convert_folder(source, output, family)
        step = None
    else:
        step = _export(values, output)
    log.say(f"wrote {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    result = {"output": str(output), "step": step}
    if values.push_to_hub:
        message = "Converted" if step is None else f"Step {step}"
        result["url"] = hub.upload(output, values.push_to_hub, message)
        log.say(f"pushed to {result['url']}")
    return result


def _check(values: flags.FlagValues) -> None:
    """Raises before hours of work are lost."""
    if bool(values.workdir) == bool(values.hf_dir):
        raise command.UsageError("give either --workdir or --hf_dir")
    card = [name for name in OF_THE_CARD if values[name].value]
    unused = card if values.hf_dir else [name for name in card if values.adapter and name != "base_model"]
    if unused:
        raise command.UsageError(f"--{unused[0]} is for the model card, which --hf_dir and --adapter do not write")
    if values.adapter and values.hf_dir:
        raise command.UsageError("--adapter goes with --workdir")
    if values.adapter and values.push_to_hub and not values.base_model:
        raise command.UsageError("--base_model is needed: others do not have your model.hf_dir")
    if values.private and not values.push_to_hub:
        raise command.UsageError("--private is for --push_to_hub")
    if values.push_to_hub:
        model_card.check_hub_id(values.push_to_hub, "--push_to_hub")


def _make_repository(values: flags.FlagValues) -> None:
    if values.push_to_hub:
        hub.create(values.push_to_hub, values.private)


def _export(values: flags.FlagValues, output: Path) -> int:
    """Returns the step that was written."""
    this = runs.reopen(command.read_path(values, "workdir"))
    if values.adapter:
        release.refuse_foreign(output, adapter=True)
        _make_repository(values)
        return release.export_adapter(this, output, values.base_model)
    scores = Path(values.evaluation) if values.evaluation else None

    def write_card(step: int, folder: Path) -> None:
        model_card.write(this, step, folder, values.base_model, values.license, scores, values.push_to_hub)
        _make_repository(values)  # before hours of writing, but after all that can be wrong here

    return release.export_run(this, output, write_card)
