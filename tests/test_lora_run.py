"""A run with low-rank factors from the command's point of view: what is trained, exported and continued."""

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers
import worlds

from depthlm_jax import release, tree
from depthlm_jax import run as runs
from depthlm_jax.cli import verify as verify_command
from depthlm_jax.data import pipeline
from depthlm_jax.errors import InputError
from depthlm_jax.train import loop
from depthlm_jax.verify import verify

LORA = {
    "model.lora.pattern": r".*/(q_proj|down_proj|qkv)", "model.lora.rank": 2, "model.lora.alpha": 8.0,
    "optim.warmup_ratio": 0.0, "optim.learning_rate": 0.05, "train.max_steps": 2,
}  # fmt: skip


def train(config, workdir) -> runs.Run:
    run = runs.open_run(config, workdir)
    batches = pipeline.training_batches(pipeline.open_sources(config), run.processor, config)
    trainer = loop.make_trainer(run.network, config, run.mesh)
    loop.run(trainer, config, workdir, batches, lambda: runs.first_parameters(run))
    return run


SLOW = {"pixtral"}  # its factors are tested beside the others' in models/test_lora.py


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in worlds.HF_CONFIGS],
)
def base(request, scenes, tmp_path_factory):
    """A bfloat16 folder, as published ones are, and the changes that make a recipe one of its family."""
    folder = tmp_path_factory.mktemp("base")
    family = {"model.family": request.param, "model.hf_config": worlds.HF_CONFIGS[request.param]}
    written = dict(family["model.hf_config"], torch_dtype="bfloat16")
    config = worlds.config(scenes, family | {"model.hf_config": written, "train.max_steps": 1})
    train(config, folder / "run")
    release.export_run(runs.reopen(folder / "run"), folder / "hf")
    return folder / "hf", family


@pytest.fixture(scope="module")
def trained(base, scenes, tmp_path_factory):
    folder, family = base
    changes = family | LORA | {"model.hf_dir": str(folder), "model.random_weights": False}
    workdir = tmp_path_factory.mktemp("lora")
    return train(worlds.config(scenes, changes), workdir)


def tensors(folder) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def test_only_factors_are_trained_and_the_rest_keeps_its_dtype(trained, base):
    _, parameters = runs.trained_parameters(trained)
    before = tree.flatten(runs.import_parameters(trained.network, base[0], trained.mesh))
    after = tree.flatten(parameters)
    for path, value in after.items():
        if path in before:
            assert value.dtype == jax.numpy.bfloat16
            np.testing.assert_array_equal(value, before[path], err_msg=path)
        else:
            assert value.dtype == np.float32 and np.asarray(value).any(), path
    assert after.keys() - before.keys() == set(trained.network.lora_paths) != set()


def test_merged_export_is_the_model_that_was_trained(trained, base, tmp_path):
    release.export_run(runs.reopen(trained.workdir), tmp_path / "hf")
    found, before = tensors(tmp_path / "hf"), tensors(base[0])
    assert found.keys() == before.keys()
    changed = {name for name in found if not np.array_equal(found[name], before[name])}
    kernels = {rule.tensor.split(".lora_")[0].replace("{}", "0") + ".weight" for rule in trained.network.lora_rules}
    assert kernels <= changed
    assert all("q_proj" in name or "down_proj" in name or "qkv" in name for name in changed)
    differences = verify(tmp_path / "hf")
    assert all(differences[name] <= limit for name, limit in verify_command.LIMITS.items())
    assert differences["greedy_equal"]


def test_the_adapter_in_peft_is_the_merged_model(trained, base, tmp_path):
    this = runs.reopen(trained.workdir)
    release.export_adapter(this, tmp_path / "adapter")
    names = sorted(file.name for file in (tmp_path / "adapter").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "depthlm.json"]
    assert json.loads((tmp_path / "adapter/depthlm.json").read_text())["focal_px"] == 50.0
    release.export_run(this, tmp_path / "hf")
    load = transformers.AutoModelForImageTextToText.from_pretrained
    model = peft.PeftModel.from_pretrained(load(base[0], dtype=torch.float32), tmp_path / "adapter").merge_and_unload()
    ours = load(tmp_path / "hf", dtype=torch.float32).state_dict()
    theirs = model.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=2**-8, atol=1e-8), name  # ours is rounded to bfloat16
    assert release.export_adapter(this, tmp_path / "adapter") == 2  # an earlier one is replaced


def test_a_stopped_run_goes_on_bit_for_bit_and_another_rank_is_another_run(trained, tmp_path):
    config = dataclasses.replace(trained.config, train=dataclasses.replace(trained.config.train, save_steps=1))
    run = runs.open_run(config, tmp_path)
    batches = pipeline.training_batches(pipeline.open_sources(config), run.processor, config)
    trainer = loop.make_trainer(run.network, config, run.mesh)

    class Stopped(Exception):
        pass

    def stop_after_one(state, batch, done=[]):  # noqa: B006 one list a run
        if done:
            raise Stopped
        done.append(1)
        return trainer.run_step(state, batch)

    with pytest.raises(Stopped):
        once = dataclasses.replace(trainer, run_step=stop_after_one)
        loop.run(once, config, tmp_path, batches, lambda: runs.first_parameters(run))
    again = train(config, tmp_path)
    (_, found), (_, expected) = (runs.trained_parameters(one) for one in (again, trained))
    for path, value in tree.flatten(expected).items():
        other = tree.flatten(found)[path]
        assert other.dtype == value.dtype
        np.testing.assert_array_equal(other, value, err_msg=path)
    other = dataclasses.replace(trained.config.model, lora=dataclasses.replace(trained.config.model.lora, rank=3))
    with pytest.raises(InputError, match="model.lora.rank: 2 there, 3 here"):
        runs.open_run(dataclasses.replace(trained.config, model=other), trained.workdir)


def test_no_adapter_without_factors_or_a_base(scenes, tmp_path):
    plain = runs.open_run(worlds.config(scenes), tmp_path / "plain")
    with pytest.raises(InputError, match=r"no adapter to export[\s\S]*random weights[\s\S]*without --adapter"):
        release.export_adapter(plain, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
