import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from depthlm_jax import config, parameter_groups, same_run, tree
from depthlm_jax.config import Group
from depthlm_jax.errors import InputError
from depthlm_jax.train import optim

SHAPES = {"embed/embedding": (11, 7), "norm/bias": (7,), "head/kernel": (7, 11)}
PATHS = (
    "lm_head/kernel", "model/layers/mlp/up_proj/kernel", "model/norm/scale", "visual/blocks/attn/qkv/bias",
    "visual/blocks/attn/qkv/kernel", "visual/merger/mlp_0/kernel",
)  # fmt: skip


def random_tree(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return tree.unflatten({path: jnp.float32(rng.normal(size=shape)) for path, shape in SHAPES.items()})


@pytest.fixture
def parameters():
    return random_tree(0)


def all_trained(parameters) -> dict[str, float]:
    return dict.fromkeys(tree.flatten(parameters), 1.0)


def first_update(parameters, gradient, factors=None, **settings) -> dict:
    """Returns the update of the first step after a warm-up of none."""
    optimizer = optim.make_optimizer(
        config.Optim(warmup_ratio=0.0, learning_rate=1.0, **settings),
        max_steps=10,
        factors=factors or all_trained(parameters),
        axes={},
    )
    return optimizer.update(gradient, optimizer.init(parameters), parameters)[0]


@pytest.mark.parametrize("norm", [0.1, 50.0])
def test_gradients_are_clipped_by_their_global_norm(parameters, norm):
    gradient = jax.tree.map(lambda x: x * norm / optax.tree.norm(parameters), parameters)
    # With an epsilon far above the gradients Adam is linear in them.
    update = first_update(parameters, gradient, adam_eps=1e6, max_grad_norm=0.5)
    assert float(optax.tree.norm(update)) * 1e6 == pytest.approx(min(norm, 0.5), rel=1e-3)


@pytest.mark.parametrize(("ratio", "steps"), [(0.1, 50), (0.03, 70), (0.0, 20), (0.25, 10), (1.0, 4)])
def test_learning_rate_is_the_one_of_transformers(ratio, steps):
    settings = config.Optim(learning_rate=0.3, warmup_ratio=ratio)
    warmup = math.ceil(ratio * steps)  # as transformers.Trainer rounds
    torch_optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs = transformers.get_cosine_schedule_with_warmup(torch_optimizer, warmup, steps)
    ours = optim.make_schedule(settings, steps)
    for number in range(steps):
        assert float(ours(number)) == pytest.approx(theirs.get_last_lr()[0], rel=1e-5, abs=1e-8), number
        torch_optimizer.step()
        theirs.step()


def test_learning_rate_at_its_corners():
    schedule = optim.make_schedule(config.Optim(learning_rate=0.3, warmup_ratio=0.1), 50)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(0.3)
    assert 0 < float(schedule(49)) < 0.001
    assert float(schedule(50)) == pytest.approx(0, abs=1e-8)


def test_weight_decay_acts_on_kernels_and_embeddings_alone(parameters):
    assert tree.flatten(optim.decayed(parameters)) == {
        "embed/embedding": True, "head/kernel": True, "norm/bias": False
    }  # fmt: skip
    still = jax.tree.map(jnp.zeros_like, parameters)
    update = tree.flatten(first_update(parameters, still, weight_decay=0.25))
    for path, value in tree.flatten(parameters).items():
        np.testing.assert_allclose(update[path], 0 if path == "norm/bias" else -0.25 * value, rtol=1e-6)


def test_adam_is_the_one_of_pytorch(parameters):
    rng = np.random.default_rng(6)
    settings = config.Optim(learning_rate=0.1, warmup_ratio=0.0, weight_decay=0.1, max_grad_norm=1e9)
    optimizer = optim.make_optimizer(settings, 10**9, {"head/kernel": 1.0}, {})  # constant over three steps
    ours = {"head": parameters["head"]}
    theirs = torch.nn.Parameter(torch.tensor(np.asarray(ours["head"]["kernel"])))
    torch_optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    state = optimizer.init(ours)
    for _ in range(3):
        gradient = rng.normal(size=theirs.shape).astype(np.float32)
        update, state = optimizer.update({"head": {"kernel": jnp.asarray(gradient)}}, state, ours)
        ours = optax.apply_updates(ours, update)
        theirs.grad = torch.tensor(gradient)
        torch_optimizer.step()
    np.testing.assert_allclose(ours["head"]["kernel"], theirs.detach(), rtol=1e-5, atol=1e-5)


# Groups


def test_a_group_is_what_its_pattern_matches_from_end_to_end():
    groups = {"vision": Group("visual/blocks/.*", 0.1), "heads": Group("lm_head/kernel|visual/merger/.*", 0.0)}
    assert parameter_groups.factors(PATHS, groups) == {
        "lm_head/kernel": 0.0, "model/layers/mlp/up_proj/kernel": 1.0, "model/norm/scale": 1.0,
        "visual/blocks/attn/qkv/bias": 0.1, "visual/blocks/attn/qkv/kernel": 0.1, "visual/merger/mlp_0/kernel": 0.0,
    }  # fmt: skip


def test_without_groups_everything_is_trained():
    assert parameter_groups.factors(PATHS, {}) == dict.fromkeys(PATHS, 1.0)


@pytest.mark.parametrize(
    ("groups", "lines"),
    [
        (
            {"vision": Group("visual/(", 0.1)},
            ["config: bad value of optim.groups.vision.pattern", "'visual/(': missing ), unterminated subpattern"],
        ),
        (
            {"all": Group(".*", 0.1), "vision": Group("visual/bloks/.*", 0.1)},
            [
                "config: optim.groups.vision.pattern matches no parameter", "found:    'visual/bloks/.*'",
                "visual/blocks/attn/qkv/", "; all begin with lm_head or model or visual",
                "fix:      set --config.optim.groups.vision.pattern='lm_head/.*', for example",
            ],
        ),
        (
            {"attention": Group("attn|mlp_0", 0.1)},
            [
                "matches no parameter", "a whole path, such as visual/blocks/attn/qkv/bias, visual/blocks/attn/qkv/ker",
                "fix:      set --config.optim.groups.attention.pattern='.*(attn|mlp_0).*'",
            ],
        ),
        (
            {"none": Group("", 0.1)},
            ["config: optim.groups.none.pattern matches no parameter", "found:    ''"],
        ),
        (
            {"one": Group("lm_head/.*", 0.1), "two": Group("visual/.*", 0.1), "three": Group(".*/blocks/.*bias", 0.1)},
            [
                "config: optim.groups.two and optim.groups.three share a parameter",
                "found:    visual/blocks/attn/qkv/bias", "narrow --config.optim.groups.three.pattern",
            ],
        ),
        (
            {"one": Group("(lm_head|model)/.*", 0.0), "two": Group("visual/.*", 0.0)},
            ["config: optim.groups freeze every parameter", "found:    one: factor 0, two: factor 0"],
        ),
    ],
    ids=["no regular expression", "nothing matched", "a part matched", "empty", "two groups", "all frozen"],
)  # fmt: skip
def test_groups_that_cannot_be_meant_are_named(groups, lines):
    with pytest.raises(InputError) as error:
        parameter_groups.factors(PATHS, groups)
    assert [line for line in lines if line not in str(error.value)] == [], str(error.value)


def test_split_and_join_are_inverse(parameters):
    for frozen in ((), ("norm/bias",), ("norm/bias", "head/kernel")):
        factors = all_trained(parameters) | dict.fromkeys(frozen, 0.0)
        parts = parameter_groups.split(parameters, factors)
        assert sorted(tree.flatten(parts[1])) == sorted(frozen)
        assert tree.flatten(parts[0]).keys() == SHAPES.keys() - set(frozen)
        whole = parameter_groups.join(*parts)
        assert jax.tree.structure(whole) == jax.tree.structure(parameters)
        assert all(one is same for one, same in zip(*map(jax.tree.leaves, (whole, parameters)), strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_factor_scales_the_whole_update_the_decay_too(parameters, decay):
    gradient, factors = random_tree(1), {"embed/embedding": 0.1, "norm/bias": 1.0, "head/kernel": 3.0}
    whole = tree.flatten(first_update(parameters, gradient, weight_decay=decay))
    scaled = tree.flatten(first_update(parameters, gradient, factors, weight_decay=decay))
    for path, factor in factors.items():
        np.testing.assert_array_equal(scaled[path], whole[path] * np.float32(factor), err_msg=path)
    if not decay:  # Adam's first step has the size of the learning rate, whatever the gradient
        np.testing.assert_allclose(np.abs(scaled["embed/embedding"]), 0.1, rtol=1e-3)


def test_the_norm_is_clipped_before_the_factors(parameters):
    """With an epsilon far above the gradients Adam is linear in them."""
    gradient, factors = random_tree(2), {"embed/embedding": 0.1, "norm/bias": 1.0, "head/kernel": 3.0}
    scaled = tree.flatten(first_update(parameters, gradient, factors, adam_eps=1e6, max_grad_norm=0.5))
    shrink = 0.5 / float(optax.tree.norm(gradient))
    for path, value in tree.flatten(gradient).items():
        np.testing.assert_allclose(scaled[path] * 1e6, -factors[path] * shrink * value, rtol=1e-3)


def test_frozen_parameters_do_not_count_in_the_norm(parameters):
    gradient, factors = random_tree(3), all_trained(parameters) | {"head/kernel": 0.0}
    part, _ = parameter_groups.split(gradient, factors)
    update = first_update(
        parameter_groups.split(parameters, factors)[0], part, factors, adam_eps=1e6, max_grad_norm=0.5
    )
    assert tree.flatten(update).keys() == {"embed/embedding", "norm/bias"}
    assert float(optax.tree.norm(update)) * 1e6 == pytest.approx(0.5, rel=1e-3)


# Recipes


def test_groups_of_a_recipe_are_parsed():
    recipe = config.default_config()
    assert config.parse(recipe).optim.groups == {}
    recipe.optim.groups = config.groups({"vision": {"pattern": "visual/.*", "factor": 0}})
    assert config.parse(recipe).optim.groups == {"vision": Group("visual/.*", 0.0)}


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"vision": {"pattern": "visual/.*"}}, "config: optim.groups.vision.factor is missing"),
        ({"vision": {"pattern": 3, "factor": 0.1}}, "config: bad value of optim.groups.vision.pattern"),
        ({"vision": {"pattern": "a", "factor": -0.1}}, "config: bad value of optim.groups.vision.factor"),
        ({"vision": {"pattern": "a", "factor": math.nan}}, "config: bad value of optim.groups.vision.factor"),
        ({"vision": {"pattern": "a", "fctor": 0.1}}, "did you mean 'optim.groups.vision.factor'?"),
        ({"a.b": {"pattern": "a", "factor": 0.1}}, "config: bad name of a group in optim.groups"),
        ({"vision": "visual/.*"}, "config: bad value of optim.groups.vision"),
    ],
)
def test_a_group_of_a_recipe_that_is_wrong_is_named(groups, says):
    recipe = config.default_config()
    with pytest.raises(InputError) as error:
        recipe.optim.groups = config.groups(groups)
        config.parse(recipe)
    assert says in str(error.value)


def test_another_group_is_another_run():
    recipe = config.default_config()
    recipe.optim.groups = config.groups({"vision": {"pattern": "visual/.*", "factor": 0.1}})
    other = config.parse(recipe)
    with pytest.raises(InputError, match=r"optim\.groups\.vision\.factor: None there, 0\.1 here"):
        same_run.check_same_run(config.Config(), other, "runs/a")


# Other optimizers


STACKED_AXES = {
    "layers/q_proj/kernel": "LDH",
    "layers/qkv/kernel": "LD3H",
    "layers/norm/scale": "LD",
    "embed/embedding": "VD",
}
STACKED_SHAPES = {
    "layers/q_proj/kernel": (2, 160, 144), "layers/qkv/kernel": (2, 160, 3, 160), "layers/norm/scale": (2, 160),
    "embed/embedding": (200, 160),
}  # fmt: skip


def stacked(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return tree.unflatten({path: jnp.float32(rng.normal(size=shape)) for path, shape in STACKED_SHAPES.items()})


@pytest.mark.parametrize("name", optim.KINDS)
def test_every_optimizer_goes_downhill_and_decays_weights_alone(name):
    settings = config.Optim(name=name, warmup_ratio=0.0, learning_rate=1e-2, max_grad_norm=1e9)
    parameters, gradient = stacked(0), stacked(1)
    updates = {}
    for decay in (0.0, 0.5):
        decayed = dataclasses.replace(settings, weight_decay=decay)
        optimizer = optim.make_optimizer(decayed, 10, dict.fromkeys(STACKED_SHAPES, 1.0), STACKED_AXES)
        updates[decay] = optimizer.update(gradient, optimizer.init(parameters), parameters)[0]
    for path, update in tree.flatten(updates[0.0]).items():
        assert float(jnp.sum(update * tree.flatten(gradient)[path])) < 0, path
        moved = not np.array_equal(update, tree.flatten(updates[0.5])[path])
        assert moved == path.endswith(("kernel", "embedding")), path


def test_muon_makes_each_matrix_of_a_stack_orthogonal():
    settings = config.Optim(name="muon", warmup_ratio=0.0, learning_rate=1.0, max_grad_norm=1e9)
    optimizer = optim.make_optimizer(settings, 10, dict.fromkeys(STACKED_SHAPES, 1.0), STACKED_AXES)
    parameters = stacked(0)
    update = tree.flatten(optimizer.update(stacked(1), optimizer.init(parameters), parameters)[0])
    qkv_LD3H = np.asarray(update["layers/qkv/kernel"])
    for matrix in [*np.asarray(update["layers/q_proj/kernel"]), *qkv_LD3H.swapaxes(1, 2).reshape(-1, 160, 160)]:
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / np.median(values) < 2  # of a random matrix: above 2.3, and small ones near zero
        assert np.quantile(values, 0.1) / np.median(values) > 0.4


def test_adafactor_keeps_sums_over_rows_and_columns():
    settings = config.Optim(name="adafactor", warmup_ratio=0.0)
    state = optim.make_optimizer(settings, 10, dict.fromkeys(STACKED_SHAPES, 1.0), STACKED_AXES).init(stacked(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert count < 0.05 * sum(math.prod(shape) for shape in STACKED_SHAPES.values())
