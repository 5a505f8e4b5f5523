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
        (["train", f"--config={ROOT}/configs/dmeo.py"], ["unknown recipe", "did you mean configs/demo.py?"]),
        (
            ["train", DEMO, "--config.train.loss_on=all", "--workdir=x"],
            ["bad value of train.loss_on", "answer or official"],
        ),
        (["train", DEMO, "--config.data.sources.main.path=no.jsonl", "--workdir=x"], ["no.jsonl"]),
        (["evaluate", DEMO, "--workdir=no/such/run"], ["no run here", "train first, or correct --workdir"]),
        (["export", "--workdir=no/such/run", "--output=x"], ["no run here"]),
        (["verify", "--hf_dir=no/such/folder"], ["config.json"]),
    ],
)
def test_a_named_error_says_what_was_found_and_what_to_do(capsys, tmp_path, monkeypatch, arguments, texts):
    monkeypatch.chdir(tmp_path)
    status, _, err = call(capsys, *arguments)
    assert status == 1
    assert err.startswith("error: ")
    assert [text for text in [*texts, "found:", "expected:", "fix:"] if text not in err] == []
    assert list(tmp_path.iterdir()) == []  # nothing was begun


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
