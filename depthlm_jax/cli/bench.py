"""bench: what the README says of speed and memory, measured."""

from pathlib import Path

from absl import flags

from depthlm_jax import config as config_module
from depthlm_jax import log
from depthlm_jax.bench import convert, data, decode, index, save, train
from depthlm_jax.cli import command
from depthlm_jax.eval import report


def define_flags(values: flags.FlagValues) -> None:
    command.define_config(values)
    command.define_word(values, list(MEASUREMENTS), "what is measured; may be written bench data")
    command.define_path(
        values, "images", "data: a .jsonl file or the folder of a TFDS data set, beside synthetic images"
    )
    flags.DEFINE_integer("repeats", 5, "passes over the images, or steps, of each; their median counts", lower_bound=1,
                         flag_values=values)  # fmt: skip
    flags.DEFINE_integer("samples", 3, "train: samples of a batch", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("questions", 8, "decode: about one image", lower_bound=1, flag_values=values)
    command.define_path(
        values, "hf_dir", "convert: a Hugging Face folder; without it, random weights of 3B are written"
    )
    flags.DEFINE_integer("records", 1_000_000, "index: lines of the JSONL file", lower_bound=1, flag_values=values)


def run(values: flags.FlagValues) -> dict:
    if values.word is None:
        raise command.UsageError(f"bench what? one of: {', '.join(MEASUREMENTS)}")
    result = MEASUREMENTS[values.word](values)
    log.say(f"{result['ratio']:.3g} × the speed of {result['peer']}")
    return result


def _data(values: flags.FlagValues) -> dict:
    given = {Path(values.images).name: data.real(values.images)} if values.images else {}
    sources = given | {"synthetic": data.synthetic()}
    sets = {name: data.measure(source, values.repeats) for name, source in sources.items()}
    speeds, spent = [], []
    for name, found in sets.items():
        speed = {"images": found["images"], "ours/s": found["ours_images_s"], "plain/s": found["plain_images_s"]}
        speeds.append((name, speed | {"ratio": found["ratio"], "decoding alone/s": found["decode_images_s"]}))
        spent.append((name, {"ours": found["ours_ms"], **found["parts_ms"]}))
    log.say("images a second on one core\n" + report.table(speeds, list(speeds[0][1])))
    log.say("\nms an image\n" + report.table(spent, list(spent[0][1])))
    return {"ratio": min(found["ratio"] for found in sets.values()), "peer": data.PEER, "sets": sets}


def _index(values: flags.FlagValues) -> dict:
    found = index.measure(values.records)
    names = {"build": "our index, built", "open": "our index, opened again", "peer": found["peer"]}
    rows = [(text, {"s": found[f"{way}_s"], "peak MiB": found[f"{way}_mib"]}) for way, text in names.items()]
    log.say(
        f"{found['records']} records, {found['file_mib']:.0f} MiB, {found['bytes_per_record']:.0f} bytes each in memory"
    )
    log.say(report.table(rows, ["s", "peak MiB"]))
    return found


def _convert(values: flags.FlagValues) -> dict:
    found = convert.measure(Path(values.hf_dir) if values.hf_dir else None)
    names = {"cp": "cp of the weights", "export": "our export", "import": "our import, to float32"}
    rows = [
        (text, {"s": found[f"{way}_s"], "GB/s": found[f"{way}_gb_s"], "peak GB": found[f"{way}_peak_gb"]})
        for way, text in names.items()
    ]
    log.say(f"{found['tensors']} tensors, {found['bytes'] / 1e9:.3f} GB; every tensor of the export has the same bytes")
    log.say(report.table(rows, ["s", "GB/s", "peak GB"]))
    return found


def _train(values: flags.FlagValues) -> dict:
    found = {}
    if values.config:
        config = train.settings(config_module.parse(values.config))
        sizes = config.model.hf_config
        found["recipe"] = train.measure(sizes, sizes["vocab_size"], config, values.samples, values.repeats)
    else:
        for name, vocabulary in train.SHAPES.items():
            found[name] = train.measure(train.TINY, vocabulary, train.tiny_settings(), values.samples, values.repeats)
    for name, one in found.items():
        rows = [
            (text, {"samples/s": one[lane]["samples_s"], "tokens/s": one[lane]["tokens_s"], "of peak": one[lane]["mfu"],
                    "peak GB": one[f"{lane}_peak_gb"] or float("nan"), "tokens in slots": one[filled]})
            for text, lane, filled in (("ours", "ours", "filled_tokens"), ("peer", "peer", "peer_filled_tokens"))
        ]  # fmt: skip
        log.say(
            f"{name}: {one['samples']} samples, {one['tokens']} tokens, {one['useful_tflop']:.3f} useful TFLOP; peak: "
            f"{one['peak_tflops']:.3f} TFLOP/s, {one['peak_of']}; first step {one['compile_seconds']:.1f} s; "
            f"rows are made in {one['make_seconds']:.2f} s on one core: "
            f"the step waits {one['data_wait']:.0%} of the time"
        )
        log.say(report.table(rows, list(rows[0][1])) + f"\n{one['ratio']:.2f} ×\n")
    first = next(iter(found.values()))
    return {"ratio": first["ratio"], "peer": train.PEER, "shapes": found}


def _decode(values: flags.FlagValues) -> dict:
    found = decode.measure(train.TINY, train.SHAPES["DepthLM"], values.questions, values.repeats)
    rows = [(lane, {"answers/s": found[f"{lane}_answers_s"]}) for lane in ("ours", "peer")]
    log.say(f"{found['questions']} questions about one image, the same {decode.NEW_TOKENS} tokens from both")
    log.say(report.table(rows, ["answers/s"]))
    return found


def _save(values: flags.FlagValues) -> dict:
    found = save.measure(values.repeats)
    seconds = {"a save every ten steps": found["save_seconds_a_step"], "none": found["plain_seconds_a_step"]}
    rows = [(name, {"s a step": value}) for name, value in seconds.items()]
    log.say(f"checkpoints of {found['checkpoint_gb']:.2f} GB\n" + report.table(rows, ["s a step"]))
    return found


MEASUREMENTS = {
    "convert": _convert, "data": _data, "decode": _decode, "index": _index, "save": _save, "train": _train,
}  # fmt: skip
