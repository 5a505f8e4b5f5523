"""What a user sees who makes a mistake: a named error or usage, never a bare traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from depthlm_jax import __main__ as program

ROOT = Path(__file__).parents[1]
DEMO = f"--config={ROOT}/configs/demo.py"


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["depthlm_jax", *arguments])  # ml_collections looks for overrides there
        status = program.main(list(arguments))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_alone_it_lists_the_commands(capsys):
    status, out, _ = call(capsys)
    assert status == 0
    assert all(f"  {name} " in out for name in program.COMMANDS)


@pytest.mark.parametrize("name", program.COMMANDS)
def test_each_command_has_a_page_of_help(capsys, name):
    status, out, _ = call(capsys, name, "--help")
    assert status == 0
    assert out.startswith(f"python -m depthlm_jax {name}: {program.COMMANDS[name]}")
    assert "--[no]json" in out
    assert "undefok" not in out and "depthlm_jax.cli" not in out
    assert ("--config.section.field=value" in " ".join(out.split())) == ("--config:" in out)


def test_an_unknown_command_is_wrong_usage(capsys):
    status, out, err = call(capsys, "trian")
    assert status == 2
    assert "unknown command 'trian'" in err
    assert "usage:" in out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["train"], "--config is needed"),
        (["train", DEMO], "--workdir is needed"),
        (["train", DEMO, "--wrkdir=x"], "wrkdir"),
        (["train", DEMO, "stray"], "what is 'stray'?"),
        (["train", DEMO, "--config.train.max_steps=many"], "--config.train.max_steps=many: invalid literal for int()"),
        (["verify"], "--hf_dir is needed"),
        (["export", "--output=x"], "give either --workdir or --hf_dir"),
        (["curate", "--dataset=moon", "--output=x"], "moon"),
        (["sweep", "--workdir=x"], "--sweep is needed"),
        (["sweep", f"--sweep={ROOT}/configs/sweeps/demo_mixture.py", "--config.train.seed=x"], "invalid literal"),
    ],
)
def test_wrong_usage_says_what_is_wrong(capsys, arguments, text):
    status, _, err = call(capsys, *arguments)
    assert status == 2
    assert text in err
    assert f"usage: python -m depthlm_jax {arguments[0]} --help" in err


@pytest.mark.parametrize(
    "arguments, texts",
    [
        (
            ["train", DEMO, "--config.train.max_step=3"],
            ["unknown field 'train.max_step'", "did you mean 'train.max_steps'?"],
        ),
        (
            ["train", DEMO, "--config.data.sources.mian.weight=2"],
            ["unknown field 'data.sources.mian.weight'", "one of ['data.sources.main']", "data.sources.main.weight"],
        ),
        (
            ["train", DEMO, "--config.model.hf_config.vision_config.dept=3"],
            ["unknown field", "'model.hf_config.vision_config.hidden_act'", "did you mean"],
        ),
        (["train", "--config", DEMO[9:], "-config.train.max_stes", "3"], ["did you mean 'train.max_steps'?"]),
        (["train", DEMO, "--config.data.sources=x"], ["'data.sources'", "found:    a section"]),
        (["train", DEMO, "--config.data.geometry.crop_width[5]=3"], ["an override cannot be read"]),
        (["train", f"--config={ROOT}/configs/dmeo.py"], ["unknown recipe", "did you mean configs/demo.py?"]),
        (
            ["train", DEMO, "--config.train.loss_on=all", "--workdir=x"],
            ["bad value of train.loss_on", "answer or official"],
        ),
        (["train", DEMO, "--config.data.sources.main.path=no.jsonl", "--workdir=x"], ["no.jsonl"]),
        (["evaluate", DEMO, "--workdir=no/such/run"], ["no run here", "train first, or correct --workdir"]),
        (["export", "--workdir=no/such/run", "--output=x"], ["no run here"]),
        (["verify", "--hf_dir=no/such/folder"], ["config.json"]),
        (["sweep", "--sweep=demo_mixtur.py", "--workdir=x"], ["unknown sweep", "mean configs/sweeps/demo_mixture.py?"]),
        (
            ["sweep", f"--sweep={ROOT}/configs/sweeps/demo_mixture.py", "--workdir=x", "--config.optim.nam=lion"],
            ["unknown field 'optim.nam'", "did you mean 'optim.name'?"],
        ),
    ],
)
def test_a_named_error_says_what_was_found_and_what_to_do(capsys, tmp_path, monkeypatch, arguments, texts):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *arguments)
    assert status == 1
    assert err.startswith("error: ")
    assert [text for text in [*texts, "found:", "expected:", "fix:"] if text not in err] == []
    assert list(tmp_path.iterdir()) == []  # nothing was begun


RECIPES = {
    "syntax": ("def get_config(:", ["recipe.py:1: the recipe cannot be run", "SyntaxError: "]),
    "field": (
        "from depthlm_jax.config import default_config\ndef get_config():\n  config = default_config()\n"
        "  config.data.sources.mian.path = 'x'\n  return config\n",
        ["recipe.py:4: the recipe cannot be run", "AttributeError: ", 'Did you mean "main"'],
    ),
    "deeper": ("import json\n\nCONTENT = json.loads('{')", ["recipe.py:3: ", "JSONDecodeError"]),
    "file": ("open('no_such_file')", ["recipe.py:1: ", "FileNotFoundError"]),
    "no_function": ("x = 1", ["recipe.py:1: ", "KeyError: 'get_config'"]),
    "no_return": ("def get_config():\n  pass", ["get_config() returns no recipe", "NoneType"]),
    "only_a_path": (
        "from depthlm_jax.config import sources\ndef get_config():\n  return sources({'x': 'a.jsonl'})",
        ["bad value of data.sources.x", "'a.jsonl'"],
    ),
}


@pytest.mark.parametrize("text, says", RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_that_does_not_run_is_named_with_its_line(capsys, tmp_path, text, says):
    (tmp_path / "recipe.py").write_text(text)
    status, _, err = call(capsys, "train", f"--config={tmp_path}/recipe.py", "--config.train.max_steps=3")
    assert status == 1
    assert [part for part in [*says, "found:", "expected:", "fix:"] if part not in err] == []


def test_a_recipe_may_take_an_argument_and_name_its_sources(capsys, tmp_path):
    (tmp_path / "recipe.py").write_text(
        "from depthlm_jax.config import default_config, sources\ndef get_config(name):\n  config = default_config()\n"
        "  config.data.sources = sources({name: {'path': 'gone.jsonl'}})\n  return config\n"
    )
    arguments = ["train", f"--config={tmp_path}/recipe.py:far", "--config.data.sources.far.weight=2", "--workdir=x"]
    status, _, err = call(capsys, *arguments)
    assert status == 1 and "unknown field" not in err and "recipe" not in err
    status, _, err = call(capsys, *[argument.replace("sources.far", "sources.near") for argument in arguments])
    assert status == 1 and "one of ['data.sources.far']" in err


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "depthlm_jax", "verify", "--hf_dir=no/such/folder", "--debug"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "InputError" in done.stderr


def test_a_mesh_that_does_not_fit_is_named_before_anything_is_trained(capsys, tmp_path):
    assert call(capsys, "curate", f"--output={tmp_path}/scenes", "--train=2", "--validation=1")[0] == 0
    path = next((tmp_path / "scenes").rglob("dataset_info.json")).parent
    common = ["train", DEMO, f"--config.data.sources.main.path={path}", f"--workdir={tmp_path}/run"]
    for axis, text in (("tensor=3", "do not multiply"), ("tensor=4", "does not divide the heads")):
        status, _, err = call(capsys, *common, f"--config.mesh.{axis}")
        assert status == 1
        assert text in err
    assert not (tmp_path / "run/config.json").exists()  # the workdir is still free for another config
