import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from depthlm_jax import config, parameter_groups, tree
from depthlm_jax.train import optim, step

ROWS, TOKENS, ANSWERS, WIDTH, VOCABULARY = 8, 6, 5, 7, 11


def bag_logits(parameters: dict, batch: dict) -> jax.Array:
    """A model small enough to compute by hand: the logits of a slot depend on the token it stands at."""
    hidden_BTD = parameters["embed"]["embedding"][batch["tokens_BT"]] + parameters["norm"]["bias"]
    hidden_BAD = jnp.take_along_axis(hidden_BTD, batch["answer_index_BA"][..., None], axis=1)
    return hidden_BAD @ parameters["head"]["kernel"]


@pytest.fixture
def parameters():
    rng = np.random.default_rng(0)
    shapes = {"embed/embedding": (VOCABULARY, WIDTH), "norm/bias": (WIDTH,), "head/kernel": (WIDTH, VOCABULARY)}
    return tree.unflatten({path: jnp.float32(rng.normal(size=shape)) for path, shape in shapes.items()})


@pytest.fixture
def batch():
    """Rows with very different numbers of supervised tokens, and weights other than one."""
    rng = np.random.default_rng(1)
    supervised = np.arange(ANSWERS) < np.array([1, 5, 1, 5, 0, 4, 1, 5])[:, None]
    return {
        "tokens_BT": rng.integers(0, VOCABULARY, (ROWS, TOKENS)),
        "answer_index_BA": rng.integers(0, TOKENS, (ROWS, ANSWERS)),
        "targets_BA": rng.integers(0, VOCABULARY, (ROWS, ANSWERS)),
        "weights_BA": np.float32(supervised * rng.uniform(0.5, 4, (ROWS, ANSWERS))),
    }


def losses_by_hand(parameters, batch) -> np.ndarray:
    """Returns −log p of each target in float64."""
    values = {path: np.float64(value) for path, value in tree.flatten(parameters).items()}
    hidden = (values["embed/embedding"][batch["tokens_BT"]] + values["norm/bias"])[
        np.arange(ROWS)[:, None], batch["answer_index_BA"]
    ]
    logits = hidden @ values["head/kernel"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, batch["targets_BA"][..., None], axis=-1)[..., 0]


def all_trained(parameters) -> dict[str, float]:
    return dict.fromkeys(tree.flatten(parameters), 1.0)


def take_step(parameters, batch, optimizer, accumulate=1, dtype=jnp.float32, logits=bag_logits, factors=None):
    factors = factors or all_trained(parameters)
    run = jax.jit(step.make_train_step(logits, optimizer, factors, dtype, accumulate))
    trained, _ = parameter_groups.split(parameters, factors)
    return run(step.State(jnp.int32(0), parameters, optimizer.init(trained)), batch)


def test_loss_is_the_sum_over_the_sum():
    rng = np.random.default_rng(2)
    logits, targets = rng.normal(size=(2, 3, 4)) * 3, rng.integers(0, 4, (2, 3))
    weights = np.array([[1.0, 5.0, 0.0], [2.0, 0.0, 0.0]])
    sums = step.answer_loss(jnp.float32(logits), targets, jnp.float32(weights))
    expected = sum(
        weights[b, a] * (math.log(sum(math.exp(v) for v in logits[b, a])) - logits[b, a, targets[b, a]])
        for b in range(2)
        for a in range(3)
    )
    assert float(sums["loss"]) == pytest.approx(expected, rel=1e-6)
    assert (float(sums["weight"]), int(sums["tokens"])) == (8.0, 3)
    assert int(sums["right"]) == ((logits.argmax(-1) == targets) & (weights > 0)).sum()


def test_loss_equals_the_one_of_pytorch():
    rng = np.random.default_rng(3)
    logits, targets = rng.normal(size=(4, 5, 9)).astype(np.float32), rng.integers(0, 9, (4, 5))
    mask = rng.random((4, 5)) < 0.6
    sums = step.answer_loss(jnp.asarray(logits), targets, jnp.float32(mask))
    labels = torch.tensor(np.where(mask, targets, -100))
    theirs = torch.nn.functional.cross_entropy(torch.tensor(logits).flatten(0, 1), labels.flatten())
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_metrics_of_a_step(parameters, batch, accumulate):
    _, metrics = take_step(parameters, batch, optax.sgd(0.1), accumulate)
    assert metrics.keys() == step.METRICS.keys()
    weights = batch["weights_BA"]
    terms = losses_by_hand(parameters, batch) * weights
    np.testing.assert_allclose(metrics["loss_BA"], terms, rtol=1e-5, atol=1e-6)  # in the order of the rows
    assert float(metrics["loss"]) == pytest.approx(terms.sum() / weights.sum(), rel=1e-6)
    assert int(metrics["num_tokens"]) == (weights > 0).sum() == 22


@pytest.mark.parametrize("accumulate", [1, 4])
def test_slots_without_weight_do_not_matter(parameters, batch, accumulate):
    rng = np.random.default_rng(4)
    idle = batch["weights_BA"] == 0
    other = batch | {
        "targets_BA": np.where(idle, rng.integers(0, VOCABULARY, idle.shape), batch["targets_BA"]),
        "answer_index_BA": np.where(idle, rng.integers(0, TOKENS, idle.shape), batch["answer_index_BA"]),
    }
    assert not np.array_equal(other["targets_BA"], batch["targets_BA"])
    results = [take_step(parameters, b, optax.adam(0.1), accumulate) for b in (batch, other)]
    for one, same in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_nothing(parameters, batch, accumulate):
    """SGD, so that the update is the gradient itself and no optimizer hides a wrong scale."""
    (whole, metrics), (parts, in_parts) = (take_step(parameters, batch, optax.sgd(1.0), n) for n in (1, accumulate))
    for name in metrics:
        np.testing.assert_allclose(in_parts[name], metrics[name], rtol=1e-6, err_msg=name)
    for one, same in zip(jax.tree.leaves(whole.parameters), jax.tree.leaves(parts.parameters), strict=True):
        np.testing.assert_allclose(one, same, rtol=1e-6, atol=1e-6 * float(np.abs(one).max()))


def test_gradients_are_added_up_in_the_dtype_that_is_asked_for(parameters, batch):
    factors, optimizer = all_trained(parameters), optax.sgd(1.0)
    states = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        run = jax.jit(step.make_train_step(bag_logits, optimizer, factors, jnp.float32, 4, dtype))
        state, metrics = run(step.State(jnp.int32(0), parameters, optimizer.init(parameters)), batch)
        assert {leaf.dtype for leaf in jax.tree.leaves((state.parameters, metrics["loss"]))} == {jnp.dtype("float32")}
        states[dtype] = np.asarray(state.parameters["head"]["kernel"] - parameters["head"]["kernel"])
    error = np.abs(states[jnp.bfloat16] - states[jnp.float32]).max() / np.abs(states[jnp.float32]).max()
    assert 1e-5 < error < 2e-2  # rounded, and no more than that


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_mean_of_means_would_be_noticed(parameters, batch, accumulate):
    losses, weights = losses_by_hand(parameters, batch), batch["weights_BA"]
    whole = (losses * weights).sum() / weights.sum()
    micro = [
        (losses[rows] * weights[rows]).sum() / weights[rows].sum()
        for rows in (slice(start, None, accumulate) for start in range(accumulate))
    ]
    assert abs(np.mean(micro) - whole) > 1e-3 * whole


def test_a_batch_without_answers_changes_nothing(parameters, batch):
    empty = batch | {"weights_BA": np.zeros_like(batch["weights_BA"])}
    state, metrics = take_step(parameters, empty, optax.sgd(1.0))
    assert float(metrics["loss"]) == 0 and float(metrics["grad_norm"]) == 0
    for before, after in zip(jax.tree.leaves(parameters), jax.tree.leaves(state.parameters), strict=True):
        np.testing.assert_array_equal(before, after)


def test_only_answers_are_trained_on(parameters, batch):
    """Logits that stand at no supervised slot get no gradient."""

    def gradient(logits):
        return step.answer_loss(logits, batch["targets_BA"], batch["weights_BA"])["loss"]

    logits = jnp.float32(np.random.default_rng(5).normal(size=(ROWS, ANSWERS, VOCABULARY)))
    reached = np.abs(jax.grad(gradient)(logits)).sum(-1) > 0
    np.testing.assert_array_equal(reached, batch["weights_BA"] > 0)


# Freezing


FROZEN = [
    {"norm/bias": 0.0},
    {"embed/embedding": 0.0},
    {"embed/embedding": 0.0, "head/kernel": 0.0},
]


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda frozen: " ".join(frozen))
@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_frozen_stays_and_the_rest_is_trained_as_if_it_were_not(parameters, batch, frozen, accumulate):
    """SGD, so that the update is the gradient itself."""
    factors = all_trained(parameters) | frozen
    whole, _ = take_step(parameters, batch, optax.sgd(1.0), accumulate)
    part, metrics = take_step(parameters, batch, optax.sgd(1.0), accumulate, factors=factors)
    before, all_moved, moved = (tree.flatten(p) for p in (parameters, whole.parameters, part.parameters))
    assert before.keys() == moved.keys()
    for path, value in moved.items():
        if path in frozen:
            np.testing.assert_array_equal(value, before[path], err_msg=path)
        else:
            np.testing.assert_allclose(value, all_moved[path], rtol=1e-6, atol=1e-6, err_msg=path)
            assert (value != before[path]).any(), path
    gradient = [np.float64(before[path] - moved[path]) for path in moved if path not in frozen]
    norm = math.sqrt(sum((g**2).sum() for g in gradient))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_frozen_parameters_have_no_moments(parameters, batch):
    factors = all_trained(parameters) | {"embed/embedding": 0.0}
    optimizer = optim.make_optimizer(config.Optim(warmup_ratio=0.0), 10, factors, {})
    state, _ = take_step(parameters, batch, optimizer, factors=factors)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert shapes == sorted(2 * [(WIDTH,), (WIDTH, VOCABULARY)])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_frozen_parameters_keep_their_dtype(parameters, batch, dtype):
    """Even one that has no gradient, as of quantized weights."""

    def logits(parameters, batch):
        embedding = parameters["embed"]["embedding"].astype(jnp.float32)
        return bag_logits(parameters | {"embed": {"embedding": embedding}}, batch)

    factors = all_trained(parameters) | {"embed/embedding": 0.0}
    kept = (10 * parameters["embed"]["embedding"]).astype(dtype)
    mixed = parameters | {"embed": {"embedding": kept}}
    optimizer = optim.make_optimizer(config.Optim(warmup_ratio=0.0), 10, factors, {})
    state, metrics = take_step(mixed, batch, optimizer, accumulate=2, logits=logits, factors=factors)
    np.testing.assert_array_equal(state.parameters["embed"]["embedding"], kept, strict=True)
    assert state.parameters["head"]["kernel"].dtype == jnp.float32
    assert (state.parameters["head"]["kernel"] != parameters["head"]["kernel"]).any()
    assert float(metrics["grad_norm"]) > 0


# Precision


def test_compute_is_in_the_compute_dtype_and_masters_stay_float32(parameters, batch):
    seen = []

    def logits(parameters, batch):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(parameters))
        return bag_logits(parameters, batch)

    optimizer = optim.make_optimizer(config.Optim(), 10, all_trained(parameters), {})
    state, metrics = take_step(parameters, batch, optimizer, dtype=jnp.bfloat16, logits=logits)
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.parameters, metrics["loss"]))} == {jnp.dtype(jnp.float32)}
    moments = [leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert set(moments) == {jnp.dtype(jnp.float32)}


def test_updates_that_bfloat16_would_swallow_are_kept(parameters, batch):
    large = jax.tree.map(lambda x: x + 100, parameters)  # bfloat16 steps by 0.5 there
    optimizer = optax.sgd(1e-3)
    run = jax.jit(step.make_train_step(bag_logits, optimizer, all_trained(large), jnp.bfloat16, 1))
    state = step.State(jnp.int32(0), large, optimizer.init(large))
    distances = []
    for _ in range(4):
        state, _ = run(state, batch)
        moved = state.parameters["head"]["kernel"] - large["head"]["kernel"]
        distances.append(float(jnp.abs(moved).max()))
    assert 0 < distances[0] < 0.25, "the case is not a small update"
    assert distances == sorted(distances) and distances[3] > 1.5 * distances[0]
    assert int(state.step) == 4
