"""bench: what the README says of speed and memory, measured."""

from pathlib import Path

from absl import flags

from depthlm_jax import log
from depthlm_jax.bench import convert, data, index
from depthlm_jax.cli import command
from depthlm_jax.eval import report


def define_flags(values: flags.FlagValues) -> None:
    command.define_word(values, list(MEASUREMENTS), "what is measured; may be written bench data")
    command.define_path(
        values, "images", "data: a .jsonl file or the folder of a TFDS data set, beside synthetic images"
    )
    flags.DEFINE_integer("repeats", 5, "data: passes over the images; their median counts", lower_bound=1,
                         flag_values=values)  # fmt: skip
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


MEASUREMENTS = {"convert": _convert, "data": _data, "index": _index}
