"""Small models of each family, compiled for real TPU slices: what is divided, what is sent, what is held.

Needs libtpu (jax[tpu]), no TPU.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import pixtral_12b, qwen2_5_vl_3b
from depthlm_jax import config as config_module
from depthlm_jax.plan import hlo, program, topology

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: it comes with jax[tpu]"),
]
TOKENS, PATCHES, ANSWERS, VOCABULARY = 896, 64 * 36, 96, 4096  # none is also a width
RECIPES = {"qwen2_5_vl": qwen2_5_vl_3b, "pixtral": pixtral_12b}


def small(family: str, **mesh: int) -> config_module.Config:
    """Returns the recipe with two layers and narrow ones, rows of two or three samples."""
    recipe = RECIPES[family].get_config()
    sizes = recipe.model.hf_config
    text = sizes if family == "qwen2_5_vl" else sizes.text_config
    text.update(num_hidden_layers=2, hidden_size=512, intermediate_size=1024, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=VOCABULARY)  # fmt: skip
    if family == "qwen2_5_vl":
        sizes.vision_config.update(depth=2, hidden_size=320, num_heads=4, intermediate_size=640, out_hidden_size=512)
        sizes.vision_config.fullatt_block_indexes = (1,)
        recipe.data.geometry.crop_width, recipe.data.geometry.crop_height = (300, 500), (300, 500)
    else:
        sizes.vision_config.update(num_hidden_layers=2, hidden_size=256, intermediate_size=512, num_attention_heads=4)
        recipe.data.geometry.crop_width, recipe.data.geometry.crop_height = (160, 280), (160, 280)
    recipe.data.max_tokens, recipe.data.max_patches, recipe.data.max_answer_tokens = TOKENS, PATCHES, ANSWERS
    recipe.data.global_batch_rows = 32
    recipe.mesh.update(mesh)
    return config_module.parse(recipe)


@pytest.fixture(scope="module", params=[pytest.param(family, marks=pytest.mark.slow) for family in RECIPES])
def plan(request) -> program.Program:
    return program.compile_step(small(request.param, tensor=2), topology.find("v5e-16"))


def test_a_small_recipe_fits_and_its_bytes_add_up(plan):
    assert plan.fits and plan.mesh == {"replica": 1, "data": 1, "fsdp": 8, "tensor": 2}
    assert (plan.rows, plan.micro_batches) == (1, 4)
    assert plan.hbm_bytes < 2**30 < plan.hbm_limit_bytes
    assert plan.hbm_classes["optimizer"] == pytest.approx(2 * plan.hbm_classes["parameters"], rel=0.01)
    assert plan.hbm_classes["gradients"] == plan.hbm_classes["parameters"] > 1e6
    assert min(plan.hbm_classes.values()) >= 0 and min(plan.seconds.values()) > 0
    assert plan.text.count("tpu_custom_call") >= 6  # splash, forward and backward, in decoder and tower


def test_no_activation_is_gathered_and_the_merge_needs_no_collective(plan):
    """Only what tensor parallelism asks for crosses: sums of the residual stream."""
    sent = hlo.collectives(plan.text)
    assert sent, "parameters are divided: something has to be sent"
    for one in sent:
        for _, shape in one.shapes if one.kind == "all-gather" else ():
            is_activation = {TOKENS, PATCHES, PATCHES // 4, ANSWERS} & set(shape)
            # The best token of each half of the vocabulary is compared with that of the other half.
            assert not is_activation or math.prod(shape) <= 2 * ANSWERS, one
        if "gather" in one.source.rsplit("/", 1)[-1]:  # answers are looked up before halves of a sum are added
            assert not {TOKENS, PATCHES, PATCHES // 4} & {size for _, shape in one.shapes for size in shape}, one


def test_the_vocabulary_meets_answers_only(plan):
    shapes = hlo.arrays(plan.text)
    vocabulary = {VOCABULARY, VOCABULARY // 2}
    assert any(vocabulary & set(shape) and ANSWERS in shape for shape in shapes), "where is the head?"
    assert not [shape for shape in shapes if vocabulary & set(shape) and TOKENS in shape]


@pytest.mark.slow
def test_two_slices_hold_a_copy_each():
    plan = program.compile_step(small("qwen2_5_vl"), topology.find("2xv5e-16"))
    assert plan.fits and plan.mesh == {"replica": 2, "data": 1, "fsdp": 16, "tensor": 1}


def test_what_does_not_fit_is_told_with_numbers_and_what_to_change(tmp_path):
    """A process of its own, as a user starts it: 512 rows of the 3B at a time on four chips."""
    command = [
        sys.executable, "-m", "depthlm_jax", "plan", "--config=configs/qwen2_5_vl_3b.py", "--topology=v5e-4", "--json",
        "--config.model.hf_config.num_hidden_layers=2", "--config.model.hf_config.vision_config.depth=8",
        "--config.data.global_batch_rows=64",
        "--config.train.gradient_accumulation_steps=1",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["fits"] is False
    assert result["hbm_bytes"] > result["hbm_limit_bytes"] > 15 * 2**30
    assert "does NOT fit" in done.stdout and "To make it fit: raise --config.train.gradient_accumulation" in done.stdout
