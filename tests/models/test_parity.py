"""The whole model against transformers on PyTorch: float32, CPU, packed rows against samples run alone."""

import copy
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers

from depthlm_jax import tree
from depthlm_jax.models import registry
from depthlm_jax.models.execution import Execution
from depthlm_jax.train.step import answer_loss

VISION_TOLERANCE = 1e-5  # of the largest feature, where that is above 1
LOGITS_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4  # of the largest entry of the same parameter's gradient
NEW_TOKENS = 8
COMPILE_FAST = {"xla_backend_optimization_level": 0}  # the backward passes: compiling takes longer than running


@dataclasses.dataclass(frozen=True)
class Run:
    """A model, its examples packed into two rows, and what JAX makes of them."""

    case: tiny.Case
    rows: list[list[tiny.Example]]
    batch: dict[str, np.ndarray]

    @property
    def samples(self):
        return [[example.sample for example in row] for row in self.rows]

    @functools.cached_property
    def loss(self):
        return jitted_loss(self.case.network)

    @functools.cached_property
    def loss_and_gradient(self):
        """((loss, logits_BAV), gradient)."""
        return self.loss(self.case.parameters, self.batch)

    @functools.cached_property
    def logits(self):
        return jax.jit(self.case.network.logits)

    def with_batch(self, **changed) -> np.ndarray:
        return np.asarray(self.logits(self.case.parameters, self.batch | changed))


def jitted_loss(network: registry.Network):
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(parameters, batch):
        logits_BAV = network.logits(parameters, batch)
        sums = answer_loss(logits_BAV, batch["targets_BA"], batch["weights_BA"])
        return sums["loss"] / sums["weight"], logits_BAV

    return jax.jit(loss, compiler_options=COMPILE_FAST)


def make_run(name: str, tmp_path_factory) -> Run:
    case = tiny.build(tiny.EVERY_MODEL[name], tmp_path_factory.mktemp("model"))
    rows = tiny.examples(case)
    return Run(case, rows, tiny.pack_rows(case, [[example.sample for example in row] for row in rows]))


@pytest.fixture(scope="module", params=tiny.EVERY_MODEL)
def run(request, tmp_path_factory) -> Run:
    return make_run(request.param, tmp_path_factory)


@pytest.fixture(scope="module", params=tiny.ONE_OF_EACH)
def one_run(request, tmp_path_factory) -> Run:
    return make_run(request.param, tmp_path_factory)


def torch_loss_sum(run: Run) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
    """Returns the sum of the cross-entropies and each sample's logits; every sample is run alone."""
    total, logits = torch.zeros(()), []
    for row in run.rows:
        logits.append([])
        for example in row:
            logits_TV = run.case.hf_model(**example.torch_inputs).logits[0]
            logits[-1].append(logits_TV[example.sample.answer_index_A])
            targets_A = torch.tensor(example.sample.targets_A)
            total = total + torch.nn.functional.cross_entropy(logits[-1][-1], targets_A, reduction="sum")
    return total, logits


def test_logits_loss_and_every_gradient(run):
    run.case.hf_model.zero_grad()
    loss_sum, their_logits = torch_loss_sum(run)
    answers = sum(len(sample.targets_A) for row in run.samples for sample in row)
    their_loss = loss_sum / answers
    their_loss.backward()
    (loss, logits_BAV), gradient = run.loss_and_gradient

    for ours, theirs in zip(tiny.answers_of(run.samples, logits_BAV), their_logits, strict=True):
        for our_AV, their_AV in zip(ours, theirs, strict=True):
            assert their_AV.std() > 1  # a model that says something
            assert tiny.distance(our_AV, their_AV) <= LOGITS_TOLERANCE
    assert abs(float(loss) - their_loss.item()) <= LOSS_TOLERANCE

    expected = {run.case.hub_name(name): p.grad.numpy() for name, p in run.case.hf_model.named_parameters()}
    found = tiny.hub_tensors(run.case.network.rules, gradient)
    assert found.keys() == expected.keys()
    errors = {name: tiny.distance(found[name], g) / np.abs(g).max() for name, g in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE} == {}


def test_merged_vision_features(run):
    merged_BMD = run.case.jax_module.see(
        *(jnp.asarray(run.batch[name]) for name in ("patches_BPC", "patch_rc_BP2", "image_id_BP"))
    )
    for row, examples in enumerate(run.rows):
        index_T = run.batch["vision_index_BT"][row]
        with torch.no_grad():
            theirs = [
                run.case.peer.features(run.case.hf_model, run.case.peer.inputs(run.case, example.images))
                for example in examples
            ]
        their_MD = torch.cat(theirs).numpy()
        our_MD = np.asarray(merged_BMD[row])[index_T[index_T >= 0]]
        assert tiny.distance(our_MD, their_MD) <= VISION_TOLERANCE * max(1, np.abs(their_MD).max())


def test_greedy_tokens_of_right_padded_prompts(run):
    prompts = [tiny.example(run.case, grids, seed, None) for seed, grids in enumerate([[(3, 5)], [(1, 2), (5, 3)]])]
    batch = tiny.pack_rows(run.case, [[prompt.sample] for prompt in prompts])
    lengths = [len(prompt.sample.tokens_T) for prompt in prompts]
    assert len(set(lengths)) == len(lengths)
    ours_NBV = decode_greedily(run.case, batch)
    greedy = transformers.GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    greedy.eos_token_id = None
    for row, prompt in enumerate(prompts):
        run.case.hf_model.generation_config.eos_token_id = None
        theirs = run.case.hf_model.generate(
            **prompt.torch_inputs, generation_config=greedy, return_dict_in_generate=True, output_logits=True
        )
        their_tokens = theirs.sequences[0, lengths[row] :].tolist()
        assert len(their_tokens) == NEW_TOKENS
        assert ours_NBV[:, row].argmax(-1).tolist() == their_tokens
        assert tiny.distance(ours_NBV[:, row], torch.cat(theirs.logits)) <= LOGITS_TOLERANCE


def decode_greedily(case: tiny.Case, batch: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the logits of every new token."""
    rows, length = batch["tokens_BT"].shape
    logits_BAV, cache = jax.jit(case.network.prefill, static_argnums=2)(case.parameters, batch, NEW_TOKENS)
    seen_BS = np.pad(batch["segments_BT"] > 0, ((0, 0), (0, NEW_TOKENS)))
    positions_B = batch["positions_BTZ"].max((1, 2)) + 1
    decode_one, logits_NBV = jax.jit(case.network.decode_one), [np.asarray(logits_BAV[:, 0])]
    for n in range(NEW_TOKENS - 1):
        seen_BS[:, length + n] = True
        tokens_B = logits_NBV[-1].argmax(-1)
        logits_B1V, cache = decode_one(
            case.parameters, tokens_B[:, None], positions_B[:, None] + n, length + n, seen_BS[:, None].copy(), cache
        )
        logits_NBV.append(np.asarray(logits_B1V[:, 0]))
    return np.stack(logits_NBV)


@pytest.mark.parametrize("remat", ["full", pytest.param("attended", marks=pytest.mark.slow), "dots"])
def test_remat_changes_nothing(one_run, remat):
    network = registry.build(one_run.case.family, one_run.case.config, Execution(remat=remat))
    (loss, logits_BAV), gradient = jitted_loss(network)(one_run.case.parameters, one_run.batch)
    (plain_loss, plain_logits_BAV), plain_gradient = one_run.loss_and_gradient
    assert abs(float(loss - plain_loss)) <= 1e-6
    assert tiny.distance(logits_BAV, plain_logits_BAV) <= 1e-5
    errors = jax.tree.map(lambda a, b: tiny.distance(a, b) / np.abs(b).max(), gradient, plain_gradient)
    assert max(jax.tree.leaves(errors)) <= 1e-6


def test_one_changed_weight_of_any_parameter_is_seen(one_run):
    before = one_run.with_batch()
    used_token = one_run.batch["tokens_BT"][0, 0]
    unseen = []
    for path, value in tree.flatten(one_run.case.parameters).items():
        at = (used_token, 0) if path.endswith("embedding") else (0,) * value.ndim
        changed = tree.flatten(one_run.case.parameters) | {path: value.at[at].add(1.0)}
        after = one_run.logits(tree.unflatten(changed), one_run.batch)
        if tiny.distance(after, before) <= LOGITS_TOLERANCE:
            unseen.append(path)
    assert unseen == []


@pytest.mark.parametrize("axis", range(3))
def test_one_changed_position_is_seen(one_run, axis):
    if axis and one_run.case.family == "pixtral":
        pytest.skip("its positions have one axis")
    positions_BTZ = one_run.batch["positions_BTZ"].copy()
    positions_BTZ[0, np.flatnonzero(one_run.batch["vision_index_BT"][0] >= 0)[3], axis] += 5
    assert tiny.distance(one_run.with_batch(positions_BTZ=positions_BTZ), one_run.with_batch()) > LOGITS_TOLERANCE


@pytest.mark.parametrize("field", ["segments_BT", "image_id_BP"])
def test_mixed_samples_or_images_are_seen(one_run, field):
    mixed = np.minimum(one_run.batch[field], 1)
    assert tiny.distance(one_run.with_batch(**{field: mixed}), one_run.with_batch()) > 100 * LOGITS_TOLERANCE


@pytest.mark.parametrize("kept", [0, 1])
def test_a_sample_does_not_see_its_neighbour(one_run, kept):
    """Neither its words, nor its images, nor how many patches it has."""
    neighbour = tiny.example(one_run.case, [(2, 2), (4, 1)], seed=77, answer="None of your numbers.").sample
    samples = [neighbour, neighbour]
    samples[kept] = one_run.samples[0][kept]
    batch = tiny.pack_rows(one_run.case, [samples, one_run.samples[1]])
    after = tiny.answers_of([samples], one_run.logits(one_run.case.parameters, batch)[:1])[0][kept]
    before = tiny.answers_of(one_run.samples, one_run.with_batch())[0][kept]
    assert tiny.distance(after, before) <= 1e-5  # another shape, another order of summation

    fields = ("tokens_BT", "patches_BPC")
    own = {"tokens_BT": one_run.batch["segments_BT"] == kept + 1, "patches_BPC": own_patches(one_run.batch, kept)}
    changed = {name: one_run.batch[name].copy() for name in fields}
    for name in fields:
        changed[name][0][~own[name][0]] = 9
    after = tiny.answers_of(one_run.samples, one_run.with_batch(**changed))
    unchanged = tiny.answers_of(one_run.samples, one_run.with_batch())
    assert tiny.distance(after[0][kept], unchanged[0][kept]) <= 1e-6
    assert tiny.distance(after[0][1 - kept], unchanged[0][1 - kept]) > 1
    assert tiny.distance(after[1][0], unchanged[1][0]) <= 1e-6


def own_patches(batch: dict[str, np.ndarray], sample: int) -> np.ndarray:
    """Returns own_BP: the patch slots of a sample with two images; true in the other row."""
    own_BP = (batch["image_id_BP"] - 1) // 2 == sample
    own_BP[1:] = True
    return own_BP


def test_a_token_does_not_see_later_ones(one_run):
    index_BA, count = one_run.batch["answer_index_BA"], 10
    tokens_BT = one_run.batch["tokens_BT"].copy()
    tokens_BT[0, index_BA[0, count] :] = 9
    after, before = one_run.with_batch(tokens_BT=tokens_BT), one_run.with_batch()
    assert tiny.distance(after[0, :count], before[0, :count]) <= 1e-6
    assert tiny.distance(after[0, count], before[0, count]) > 1


def test_the_loss_of_a_sample_has_no_gradient_at_another_samples_words(one_run):
    first, second = one_run.samples[0]
    weights_BA = np.zeros_like(one_run.batch["weights_BA"])
    weights_BA[0, : len(first.targets_A)] = 1
    _, gradient = one_run.loss(one_run.case.parameters, one_run.batch | {"weights_BA": weights_BA})
    moved = set(np.flatnonzero(np.abs(embedding_of(gradient)).max(-1)).tolist())
    words = set(first.tokens_T[:-1].tolist()) - {one_run.case.config.image_token_id}
    assert moved == words
    assert set(second.tokens_T.tolist()) - words - {one_run.case.config.image_token_id}


def embedding_of(parameters: dict) -> jax.Array:
    return next(value for path, value in tree.flatten(parameters).items() if path.endswith("embedding"))


def test_bfloat16_stays_near_float32(one_run):
    """The divergence from float32 is at most twice that of PyTorch in bfloat16."""
    exact = one_run.with_batch()
    rough = one_run.logits(tree.cast(one_run.case.parameters, jnp.bfloat16), one_run.batch)
    assert rough.dtype == jnp.float32
    exact, rough = (jax.nn.log_softmax(logits_BAV) for logits_BAV in (exact, rough))
    kl_BA = np.asarray(jnp.sum(jnp.exp(exact) * (exact - rough), axis=-1))[one_run.batch["weights_BA"] > 0]
    theirs_A = divergence_of_torch(one_run)
    assert 0 < kl_BA.mean() <= 2 * theirs_A.mean()
    assert kl_BA.max() <= 2 * theirs_A.max()


def divergence_of_torch(run: Run) -> np.ndarray:
    """Returns KL(float32 ‖ bfloat16) of PyTorch at every answer position."""
    rough_model, found = copy.deepcopy(run.case.hf_model).to(torch.bfloat16), []
    for example in itertools.chain(*run.rows):
        inputs = example.torch_inputs
        with torch.no_grad():
            exact = run.case.hf_model(**inputs).logits[0]
            pixels = inputs["pixel_values"].to(torch.bfloat16)
            rough = rough_model(**inputs | {"pixel_values": pixels}).logits[0].float()
        log_p, log_q = (x[example.sample.answer_index_A].log_softmax(-1) for x in (exact, rough))
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found).numpy()


TURNS = [(f"{tiny.QUESTION} number {number}", f"<answer> {number}.25 </answer>") for number in range(1, 5)]


def test_independent_questions_answer_as_if_alone(one_run):
    """Logits, loss and gradient of four questions that share two images are those of four samples of their own."""
    case = one_run.case
    images = [tiny.random_images(case.config, grids, seed) for seed, grids in enumerate([[(3, 5), (2, 2)], [(6, 4)]])]
    together = [[case.processor.encode(pictures, TURNS)] for pictures in images]
    alone = [[case.processor.encode(pictures, [turn]) for turn in TURNS] for pictures in images]
    (loss, logits_BAV), gradient = one_run.loss(case.parameters, tiny.pack_rows(case, together))
    (alone_loss, alone_logits_BAV), alone_gradient = one_run.loss(case.parameters, tiny.pack_rows(case, alone))
    for row in range(2):
        answers = sum(len(sample.targets_A) for sample in alone[row])
        assert tiny.distance(logits_BAV[row, :answers], alone_logits_BAV[row, :answers]) <= LOGITS_TOLERANCE
    assert abs(float(loss - alone_loss)) <= LOSS_TOLERANCE
    errors = jax.tree.map(lambda a, b: tiny.distance(a, b) / np.abs(b).max(), gradient, alone_gradient)
    assert max(jax.tree.leaves(errors)) <= GRADIENT_TOLERANCE


def test_a_conversation_is_what_pytorch_sees(one_run):
    case, images = one_run.case, tiny.random_images(one_run.case.config, [(3, 5), (2, 2)], 0)
    sample = case.processor.encode(images, TURNS, layout="conversation")
    logits_BAV = one_run.logits(case.parameters, tiny.pack_rows(case, [[sample], [sample]]))
    with torch.no_grad():
        logits_TV = case.hf_model(**tiny.torch_inputs(case, sample, images)).logits[0]
    assert tiny.distance(logits_BAV[1, : len(sample.targets_A)], logits_TV[sample.answer_index_A]) <= LOGITS_TOLERANCE
