"""Parts of the model against the same parts of transformers, from norms to blocks."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from transformers.models.pixtral.modeling_pixtral import generate_block_attention_mask

from depthlm_jax.models.attention import Among, reference
from depthlm_jax.models.layers import normalised

TOLERANCE = 1e-5
NAMES = (
    "pixtral, narrower heads",
    "pixtral, wider heads, one layer",
    "pixtral, six heads share keys, deep tower",
)
GRIDS = [[(3, 5), (9, 2)], [(4, 4), (1, 7), (2, 1)]]  # of the images of each row


@dataclasses.dataclass(frozen=True)
class Rows:
    examples: list[tiny.Example]
    batch: dict[str, np.ndarray]

    @property
    def valid_BP(self) -> np.ndarray:
        return self.batch["image_id_BP"] > 0


@pytest.fixture(scope="module", params=NAMES)
def case(request, tmp_path_factory) -> tiny.Case:
    return tiny.build(tiny.PIXTRAL_MODELS[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(case) -> Rows:
    examples = [tiny.example(case, grids, seed) for seed, grids in enumerate(GRIDS)]
    rows = Rows(examples, tiny.pack_rows(case, [[example.sample] for example in examples]))
    assert not rows.valid_BP.all(axis=1).any()  # each has padding
    return rows


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def run_torch(module, *args, **named):
    with torch.no_grad():
        found = module(*args, **named)
    return found[0] if isinstance(found, tuple) else found


def test_norms(case):
    tower, decoder = case.hf_model.model.vision_tower, case.hf_model.model.language_model
    ours = case.jax_module
    blocks, layers = tiny.layer_of(ours.vision_tower.transformer["layers"], 0), ours.decoder().layers
    pairs = [
        (ours.vision_tower.ln_pre, tower.ln_pre),
        (blocks.attention_norm, tower.transformer.layers[0].attention_norm),
        (blocks.ffn_norm, tower.transformer.layers[0].ffn_norm),
        (tiny.layer_of(layers, 0).post_attention_layernorm, decoder.layers[0].post_attention_layernorm),
        (ours.decoder().norm, decoder.norm),
    ]
    for our_norm, their_norm in pairs:
        x = 3 * normal(5, len(their_norm.weight))
        x[0] = 1e-4  # where epsilon counts
        assert tiny.distance(our_norm(jnp.asarray(x)), run_torch(their_norm, torch.tensor(x))) <= TOLERANCE


def test_patch_embedding_and_normalised_pixels(case, rows):
    config, tower, side = case.config, case.hf_model.model.vision_tower, case.config.grid_px
    pixels_BPC = normalised(rows.batch["patches_BPC"], config.rescale_factor, config.image_mean, config.image_std)
    embedded_BPD = case.jax_module.vision_tower.patch_conv(pixels_BPC)
    for row, (grids, example) in enumerate(zip(GRIDS, rows.examples, strict=True)):
        values = example.torch_inputs["pixel_values"]
        expected_pixels, expected = [], []
        for (down, across), image in zip(grids, values, strict=True):
            image = image[:, : down * side, : across * side]  # without the padding to the largest
            patches = image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4)
            expected_pixels.append(patches.reshape(down * across, -1))
            expected.append(run_torch(tower.patch_conv, image[None])[0].flatten(1).T)
        valid_P = rows.valid_BP[row]
        assert tiny.distance(pixels_BPC[row][valid_P], torch.cat(expected_pixels)) <= 1e-6
        assert tiny.distance(embedded_BPD[row][valid_P], torch.cat(expected)) <= TOLERANCE


def their_turn(case, grids) -> tuple[torch.Tensor, torch.Tensor]:
    places = [np.stack(np.divmod(np.arange(down * across), across), axis=-1) for down, across in grids]
    places_P2 = torch.tensor(np.concatenate(places))
    return case.hf_model.model.vision_tower.patch_positional_embedding(torch.zeros(1), places_P2)


def test_rotary_of_rows_and_columns(case, rows):
    turn = case.jax_module.vision_tower.turn(jnp.asarray(rows.batch["patch_rc_BP2"]))
    half = turn[0].shape[-1]
    for row, grids in enumerate(GRIDS):
        for ours_BPk, theirs_PK in zip(turn, their_turn(case, grids), strict=True):
            ours_Pk = ours_BPk[row][rows.valid_BP[row]]
            assert theirs_PK.shape[-1] == 2 * half
            assert tiny.distance(ours_Pk, theirs_PK[:, :half]) <= TOLERANCE
            assert tiny.distance(ours_Pk, theirs_PK[:, half:]) <= TOLERANCE  # both halves of a head turn alike


@pytest.mark.parametrize("part", ["attention", "block"])
def test_vision_attention_and_block(case, rows, part):
    """Several images a row: each sees itself alone."""
    depth = case.config.vision.num_hidden_layers
    tower, theirs = case.jax_module.vision_tower, case.hf_model.model.vision_tower.transformer.layers[depth - 1]
    ours = tiny.layer_of(tower.transformer["layers"], depth - 1)
    ours, theirs = (ours.attention, theirs.attention) if part == "attention" else (ours, theirs)
    x_BPD = normal(*rows.valid_BP.shape, case.config.vision.hidden_size)
    turn, images = tower.turn(jnp.asarray(rows.batch["patch_rc_BP2"])), Among(jnp.asarray(rows.batch["image_id_BP"]))
    found_BPD = ours(jnp.asarray(x_BPD), turn, lambda q, k, v: reference(q, k, v, images))
    for row, grids in enumerate(GRIDS):
        valid_P = rows.valid_BP[row]
        x_1PD = torch.tensor(x_BPD[row, valid_P][None])
        mask = generate_block_attention_mask([down * across for down, across in grids], x_1PD)
        named = {"attention_mask": mask, "position_embeddings": their_turn(case, grids)}
        expected_PD = run_torch(theirs, x_1PD, **named).reshape(x_1PD.shape[1:])
        assert tiny.distance(found_BPD[row][valid_P], expected_PD) <= TOLERANCE


def test_projector(case):
    x_BPD = normal(2, 6, case.config.vision.hidden_size)
    found = case.jax_module.multi_modal_projector(jnp.asarray(x_BPD))
    expected = run_torch(case.hf_model.model.multi_modal_projector, torch.tensor(x_BPD))
    assert tiny.distance(found, expected) <= TOLERANCE


def test_decoder_attention_and_block(case):
    """Heads of a width of their own, at positions that differ from row to row."""
    theirs, number = case.hf_model.model.language_model, case.config.decoder.num_hidden_layers - 1
    layer = tiny.layer_of(case.jax_module.decoder().layers, number)
    x_BTD = normal(2, 23, case.config.decoder.hidden_size)
    positions_BT = np.cumsum(np.random.default_rng(0).integers(1, 9, x_BTD.shape[:2]), axis=1)
    their_turn = theirs.rotary_emb(torch.tensor(x_BTD), torch.tensor(positions_BT))
    turn = case.jax_module.turn(jnp.asarray(np.repeat(positions_BT[..., None], 3, axis=-1)))
    half = case.config.decoder.head_width // 2
    for our_part, their_part in zip(turn, their_turn, strict=True):
        assert tiny.distance(our_part, their_part[..., :half]) <= TOLERANCE
    before = Among(jnp.ones(x_BTD.shape[:2], int), causal=True)
    named = {"position_embeddings": their_turn, "attention_mask": None}

    def attend(q, k, v):
        return reference(q, k, v, before)

    found, _ = layer.self_attn(jnp.asarray(x_BTD), turn, attend, None, 0)
    expected = run_torch(theirs.layers[number].self_attn, torch.tensor(x_BTD), **named)
    assert tiny.distance(found, expected) <= TOLERANCE
    found, _ = layer(jnp.asarray(x_BTD), turn, attend)
    expected = run_torch(theirs.layers[number], torch.tensor(x_BTD), **named)
    assert tiny.distance(found, expected) <= TOLERANCE
