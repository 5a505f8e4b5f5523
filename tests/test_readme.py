"""Every command in the README is run, as a user's process, on data and models that fit a test."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import worlds

from depthlm_jax import run as runs
from depthlm_jax.config import Config, default_config, parse
from depthlm_jax.data import pipeline
from depthlm_jax.errors import InputError
from depthlm_jax.train import loop, skips

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", "")
COMMANDS = [line for line in BLOCKS.splitlines() if line.startswith("python -m depthlm_jax")]
SCRIPTS = [line for line in BLOCKS.splitlines() if line.startswith("bash")]

SMALL_ROWS = (
    "--config.data.global_batch_rows=8 --config.data.max_tokens=512 --config.data.max_patches=1024 "
    "--config.data.geometry.focal_px=100.0 --config.data.geometry.crop_width=(0,0) --config.train.max_steps=1 "
    "--config.train.gradient_accumulation_steps=1 --config.data.workers=1 "
    "--config.model.compute_dtype=float32"
)
EXTRA = {  # what a test adds to a command so that it ends soon; the command itself stays as printed
    "preview": f"{SMALL_ROWS} --samples=3",
    "train 3b": SMALL_ROWS,
    "evaluate 3b": "--config.eval.samples=3 --config.eval.batch_rows=8 --config.eval.max_new_tokens=4",
    "plan 3b": "--config.model.hf_config.num_hidden_layers=1 --config.model.hf_config.hidden_size=256 "
    "--config.model.hf_config.intermediate_size=512 --config.model.hf_config.num_attention_heads=2 "
    "--config.model.hf_config.vision_config.depth=1 --config.model.hf_config.vision_config.hidden_size=128 "
    "--config.model.hf_config.vision_config.num_heads=2 --config.model.hf_config.vision_config.out_hidden_size=256 "
    "--config.data.max_tokens=512 --config.data.max_patches=1024 "
    "--config.data.geometry.crop_width=(150,250) --config.data.geometry.crop_height=(150,250)",
    "train ibims1": "--config.train.max_steps=4 --config.data.max_tokens=700 --config.data.global_batch_rows=8",
}


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


def train(config: Config, workdir: Path) -> None:
    this = runs.open_run(config, workdir)
    batches = pipeline.training_batches(pipeline.open_sources(config), this.processor, config)
    trainer = loop.make_trainer(this.network, config, this.mesh)
    loop.run(trainer, config, workdir, batches, lambda: runs.first_parameters(this))


def keep_rows(config: Config, workdir: Path) -> None:
    """Leaves the rows of a batch as a run does that stops because of them."""
    rows = next(pipeline.training_batches(pipeline.open_sources(config), runs.reopen(workdir).processor, config))
    skipped = skips.Skips(workdir, config, 0)
    skipped.limit = 1
    with pytest.raises(InputError):
        skipped.count(70, {"loss": float("nan")}, rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with everything that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "ibims1").mkdir()
    scenes = worlds.render(folder / "scenes")
    records = worlds.write_jsonl(scenes, folder, 6)
    (folder / "validation.jsonl").write_text(records.read_text())
    worlds.write_jsonl(scenes, folder / "ibims1", 6).rename(folder / "ibims1/ibims1_subset.jsonl")
    train(worlds.config(scenes, {"train.max_steps": 1}), folder / "runs/demo")
    keep_rows(worlds.config(scenes), folder / "runs/demo")
    base = f"python -m depthlm_jax export --workdir=runs/demo --output={folder}/Qwen2.5-VL-3B-Instruct"
    assert run(base, folder).returncode == 0
    return folder


def extra(command: str) -> str:
    recipe = re.search(r"configs/(?:qwen2_5_vl_)?(\w+)\.py", command)
    name = shlex.split(command)[3]
    return EXTRA[name if name == "preview" else f"{name} {recipe[1]}"] if recipe else ""


def test_every_script_of_the_readme_is_known():
    assert SCRIPTS == [
        "bash launch/local.sh",
        "bash tests/run.sh",
    ]  # test_local.py runs the former (slow); the latter runs this


def test_readme_commands_run_in_their_order(place):
    assert len(COMMANDS) >= 8
    for command in COMMANDS:
        done = run(f"{command} {extra(command)} --json", place)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        assert json.loads(done.stdout.splitlines()[-1]), command
    pictures = ("preview.html", "runs/3b/loss.png", "runs/3b/evaluation/answers.png", "runs/3b/evaluation/scatter.png")
    assert [name for name in pictures if not (place / name).is_file()] == []
    export, copy = (place / "runs/demo" / name / "model.safetensors" for name in ("hf", "copy"))
    assert export.read_bytes() == copy.read_bytes()


def test_every_file_in_the_readme_exists():
    tree = re.search(r"## Files\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]
    prefix, missing = "", []
    for line in tree.splitlines():
        path = line.split()[0]
        prefix = path if not line.startswith(" ") else prefix
        file = ROOT / (path if not line.startswith(" ") else f"{prefix}{path}")
        missing += [] if file.exists() else [path]
    assert missing == []
    modules = {str(f.relative_to(ROOT / "depthlm_jax")) for f in (ROOT / "depthlm_jax").rglob("*.py")}
    folders = ("cli/", "models/qwen2_5_vl/", "models/pixtral/")
    lines = {line.split()[0]: line for line in tree.splitlines()}  # that of a folder may name its files
    modules -= {m for m in modules if Path(m).name in lines.get(f"{Path(m).parent}/", "").split()}
    modules -= {m for m in modules if m in tree or m.startswith(folders) or "__init__" in m}
    assert modules == set()


def test_recipe_lines_of_the_readme():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    recipe = default_config()
    for lines in blocks:
        exec(lines, {"config": recipe})
    config = parse(recipe)
    assert {name: group.factor for name, group in config.optim.groups.items()} == {"tower": 0.0, "merger": 0.1}
    data = config.data
    assert {name: source.weight for name, source in data.sources.items()} == {"streets": 1.0, "rooms": 0.1}
    assert data.reference.questions == 10 and data.tasks.two_points == 0.5


def test_messages_of_the_readme_are_in_the_code():
    table = README.split("## Messages")[1].split("## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    code = "\n".join(file.read_text() for file in (ROOT / "depthlm_jax").rglob("*.py"))
    assert len(messages) >= 10 and [message for message in messages if message not in code] == []


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_of_the_readme_lead_to_files(link):
    assert (ROOT / link).exists()
