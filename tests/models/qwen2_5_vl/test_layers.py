"""Parts of the model against the same parts of transformers, from norms to blocks."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers import vision_utils

from depthlm_jax.models.attention import Among, reference
from depthlm_jax.models.layers import normalised

TOLERANCE = 1e-5
NAMES = (
    "two heads share keys, tied, last blocks full",
    "eight heads share keys, ends full, patch 8",
    "nine patches merge, four sections",
)


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory) -> tiny.Case:
    return tiny.build(tiny.MODELS[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def example(case) -> tiny.Example:
    return tiny.example(case, [(3, 5), (9, 2)], seed=0)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def run_torch(module, *args, **named):
    with torch.no_grad():
        found = module(*args, **named)
    return found[0] if isinstance(found, tuple) else found


def test_norms(case):
    pairs = [
        (case.jax_module.model.norm, case.hf_model.model.language_model.norm),
        (case.jax_module.visual.merger.ln_q, case.hf_model.model.visual.merger.ln_q),
    ]
    for ours, theirs in pairs:
        x = 3 * normal(5, len(theirs.weight))
        x[0] = 1e-4  # where epsilon counts
        assert tiny.distance(ours(jnp.asarray(x)), run_torch(theirs, torch.tensor(x))) <= TOLERANCE


def test_patch_embedding_and_normalised_pixels(case, example):
    visual, valid_P = case.jax_module.visual, example.sample.image_id_P > 0
    patches_PC, config = jnp.asarray(example.sample.patches_PC), case.config
    pixels_PC = normalised(patches_PC, 1 / 255, config.image_mean, config.image_std)[valid_P]
    theirs = in_window_order(case, example, example.torch_inputs["pixel_values"])
    frames = theirs.reshape(len(theirs), 3, 2, -1)
    assert tiny.distance(pixels_PC, frames[:, :, 0].reshape(len(theirs), -1)) <= 1e-6
    embedded = visual.patch_embed["proj"](pixels_PC)
    assert tiny.distance(embedded, run_torch(case.hf_model.model.visual.patch_embed, theirs)) <= TOLERANCE


def in_window_order(case, example, x_P: torch.Tensor) -> torch.Tensor:
    unit = case.config.patches_per_merged
    index, _ = windows(case, example)
    return x_P.reshape(-1, unit, *x_P.shape[1:])[index].reshape(x_P.shape)


def windows(case, example) -> tuple[torch.Tensor, torch.Tensor]:
    vision = case.config.vision
    grid = example.torch_inputs["image_grid_thw"]
    return vision_utils.get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)


def their_vision_arguments(case, example, full: bool) -> dict:
    grid = example.torch_inputs["image_grid_thw"]
    places = vision_utils.get_vision_position_ids(grid, case.config.vision.spatial_merge_size)
    turn = case.hf_model.model.visual.rotary_pos_emb(torch.zeros(1), places)
    lengths = vision_utils.get_vision_cu_seqlens(grid) if full else windows(case, example)[1]
    return {
        "position_embeddings": tuple(in_window_order(case, example, part) for part in turn), "cu_seqlens": lengths,
    }  # fmt: skip


@pytest.mark.parametrize("full", [False, True])
def test_vision_attention_and_block(case, example, full):
    visual, theirs = case.jax_module.visual, case.hf_model.model.visual.blocks[1]
    ours = tiny.layer_of(visual.blocks, 1)
    sample, valid_P = example.sample, example.sample.image_id_P > 0
    x_PD = normal(len(valid_P), case.config.vision.hidden_size)
    turn = visual.turn(jnp.asarray(sample.patch_rc_P2[None]))
    ids_1P = jnp.asarray(sample.image_id_P[None])
    attend = visual.among_images(ids_1P) if full else visual.among_windows(ids_1P)
    for our_part, their_part in ((ours.attn, theirs.attn), (ours, theirs)):
        found_PD = our_part(x_PD[None], turn, attend)[0]
        named = their_vision_arguments(case, example, full)
        expected_PD = run_torch(their_part, torch.tensor(x_PD[valid_P]), **named)
        assert tiny.distance(found_PD[valid_P], expected_PD) <= TOLERANCE


def test_merger(case):
    x_PD = normal(6 * case.config.patches_per_merged, case.config.vision.hidden_size)
    found = case.jax_module.visual.merger(x_PD[None])[0]
    assert tiny.distance(found, run_torch(case.hf_model.model.visual.merger, torch.tensor(x_PD))) <= TOLERANCE


def test_decoder_attention_and_block(case, example):
    theirs = case.hf_model.model.language_model
    layer = tiny.layer_of(case.jax_module.model.layers, 1)
    positions_TZ = example.sample.positions_TZ
    x_BTD = normal(1, len(positions_TZ), case.config.decoder.hidden_size)
    their_turn = theirs.rotary_emb(torch.tensor(x_BTD), torch.tensor(positions_TZ.T[:, None]))
    turn = case.jax_module.turn(jnp.asarray(positions_TZ[None]))
    half = case.config.decoder.head_width // 2
    for ours_part, their_part in zip(turn, their_turn, strict=True):
        assert tiny.distance(ours_part, their_part[..., :half]) <= TOLERANCE
    before = Among(jnp.ones(x_BTD.shape[:2], int), causal=True)

    def attend(q, k, v):
        return reference(q, k, v, before)

    found, _ = layer.self_attn(jnp.asarray(x_BTD), turn, attend, None, 0)
    expected = run_torch(theirs.layers[1].self_attn, torch.tensor(x_BTD), position_embeddings=their_turn)
    assert tiny.distance(found, expected) <= TOLERANCE
    found, _ = layer(jnp.asarray(x_BTD), turn, attend)
    expected = run_torch(theirs.layers[1], torch.tensor(x_BTD), position_embeddings=their_turn)
    assert tiny.distance(found, expected) <= TOLERANCE
