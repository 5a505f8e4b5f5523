"""Two optimizer steps here and in PyTorch, from the same checkpoint and the same samples, in float32.

Here samples are packed into rows; there each is run alone. Adam divides a gradient by its own size, so that an entry
whose gradient is mere rounding goes anywhere within the learning rate. With the recipes' learning rate and epsilon that
stays below the tolerance. With a learning rate so large that each part of the step is seen, a few entries in 10,000 do
not, in PyTorch against its own float64 neither: there epsilon is 1e-5.
"""

import copy
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from depthlm_jax import parameter_groups, tree
from depthlm_jax.config import Group, Optim
from depthlm_jax.train import optim, step

MODELS = [  # of tiny.EVERY_MODEL
    "one key head, tied, windows only", "each head its own keys, first block full", "pixtral, narrower heads",
]  # fmt: skip
TOLERANCE = 1e-5  # of the largest entry of each tensor
RECIPE = Optim(learning_rate=5.5e-5, warmup_ratio=0.1, weight_decay=0.1)
LARGE = Optim(
    learning_rate=1e-3, warmup_ratio=0.0, weight_decay=0.1, adam_b1=0.8, adam_b2=0.7, adam_eps=1e-5, max_grad_norm=1.0
)
GROUPS = {"frozen": Group(r".*/up_proj/.*", 0.0), "slow": Group(r".*/layers/.*/(q|k|v)_proj/.*", 0.1)}
SETTINGS = {
    "recipe": RECIPE,
    "large steps": LARGE,
    "groups": dataclasses.replace(LARGE, groups=GROUPS),
}
STEPS, MAX_STEPS = 2, 4  # the learning rate falls in between


@dataclasses.dataclass(frozen=True)
class World:
    case: tiny.Case
    rows: list[list[tiny.Example]]

    @functools.cached_property
    def path_of(self) -> dict[str, str]:
        """{name of a tensor on the hub: path of the parameter that it is a part of}."""
        shapes = self.case.network.shapes
        return {name: rule.path for rule in self.case.network.rules for name in rule.tensors(shapes[rule.path])}

    @property
    def first(self) -> dict[str, np.ndarray]:
        return tiny.hub_tensors(self.case.network.rules, self.case.parameters)


@pytest.fixture(scope="module")
def open_world(tmp_path_factory):
    @functools.cache
    def make(name: str) -> World:
        case = tiny.build(tiny.EVERY_MODEL[name], tmp_path_factory.mktemp("hf"))
        return World(case, tiny.examples(case))

    return make


@dataclasses.dataclass(frozen=True)
class Result:
    tensors: dict[str, np.ndarray]
    norms: list[float]  # of the gradients of each step, before clipping


def ours(world: World, settings: Optim) -> Result:
    network = world.case.network
    factors = parameter_groups.factors(network.shapes, settings.groups)
    optimizer = optim.make_optimizer(settings, MAX_STEPS, factors, network.axes)
    run = jax.jit(step.make_train_step(network.logits, optimizer, factors, jnp.float32, 1))
    batch = tiny.pack_rows(world.case, [[example.sample for example in row] for row in world.rows])
    trained, _ = parameter_groups.split(world.case.parameters, factors)
    state, norms = step.State(jnp.int32(0), world.case.parameters, optimizer.init(trained)), []
    for _ in range(STEPS):
        state, metrics = run(state, batch)
        norms.append(float(metrics["grad_norm"]))
    return Result(tiny.hub_tensors(network.rules, state.parameters), norms)


def torch_loss(model, rows: list[list[tiny.Example]]) -> torch.Tensor:
    total, answers = torch.zeros(()), 0
    for example in (example for row in rows for example in row):
        logits_AV = model(**example.torch_inputs).logits[0][example.sample.answer_index_A]
        targets_A = torch.tensor(example.sample.targets_A)
        total = total + torch.nn.functional.cross_entropy(logits_AV, targets_A, reduction="sum")
        answers += len(targets_A)
    return total / answers


def torch_groups(world: World, model, settings: Optim) -> list[dict]:
    """Returns what AdamW takes; what belongs to no group is frozen. Decay acts on matrices, not on biases and norms."""
    factors = parameter_groups.factors(world.case.network.shapes, settings.groups)
    groups = []
    for name, parameter in model.named_parameters():
        path = world.path_of[world.case.hub_name(name)]
        parameter.requires_grad_(factors[path] > 0)
        if factors[path] > 0:
            decay = 0.0 if path.endswith(("bias", "scale")) else settings.weight_decay
            lr = factors[path] * settings.learning_rate
            groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return groups


def torch_schedule(settings: Optim, number: int) -> float:
    """Returns the learning rate of a step, from 0, as a part of the largest."""
    warmup = math.ceil(settings.warmup_ratio * MAX_STEPS)
    if number < warmup:
        return number / warmup
    return 0.5 * (1 + math.cos(math.pi * (number - warmup) / (MAX_STEPS - warmup)))


def theirs(world: World, settings: Optim) -> Result:
    model = copy.deepcopy(world.case.hf_model)
    groups = torch_groups(world, model, settings)
    betas = settings.adam_b1, settings.adam_b2
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.adam_eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: torch_schedule(settings, number))
    trained, norms = [group["params"][0] for group in groups], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch_loss(model, world.rows).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)))
        optimizer.step()
        schedule.step()
    tensors = {world.case.hub_name(name): value.detach().numpy() for name, value in model.named_parameters()}
    return Result(tensors, norms)


def distances(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns {name: largest difference, as a part of the largest entry}."""
    assert one.keys() == other.keys()
    return {name: tiny.distance(one[name], value) / np.abs(value).max() for name, value in other.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_two_steps_are_those_of_pytorch(open_world, name, settings):
    world = open_world(name)
    found, expected = ours(world, settings), theirs(world, settings)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=1e-5)
    assert min(expected.norms) > settings.max_grad_norm  # clipped
    errors = distances(found.tensors, expected.tensors)
    print(f"\n{name}: largest error {max(errors.values()):.1e}, of {max(errors, key=errors.get)}")
    assert {tensor: error for tensor, error in errors.items() if not error <= TOLERANCE} == {}
    factors = parameter_groups.factors(world.case.network.shapes, settings.groups)
    first = world.first
    for tensor, moved in distances(first, expected.tensors).items():
        factor = factors[world.path_of[tensor]]
        if factor == 0:
            np.testing.assert_array_equal(found.tensors[tensor], first[tensor], err_msg=tensor)
        else:
            assert moved > 2 * factor * TOLERANCE, tensor


WITHOUT = {
    "weight decay": {"weight_decay": 0.0},
    "clipping": {"max_grad_norm": 1e9},
    "warm-up": {"warmup_ratio": 0.25},
    "first beta": {"adam_b1": 0.9},
    "second beta": {"adam_b2": 0.999},
    "epsilon": {"adam_eps": 1e-3},
    "groups": {"groups": {}},
    "factor": {"groups": GROUPS | {"slow": Group(GROUPS["slow"].pattern, 0.2)}},
    "freezing": {"groups": {"slow": GROUPS["slow"]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_each_part_of_a_step_is_seen_by_the_tolerance(open_world, name):
    world, settings = open_world(name), SETTINGS["groups"]
    whole = theirs(world, settings).tensors
    for part, change in WITHOUT.items():
        errors = distances(theirs(world, dataclasses.replace(settings, **change)).tensors, whole)
        assert max(errors.values()) > 3 * TOLERANCE, part


def test_the_parameters_of_the_models_are_those_of_the_groups(open_world):
    for name in MODELS:
        world = open_world(name)
        factors = set(parameter_groups.factors(world.case.network.shapes, GROUPS).values())
        assert factors == {0.0, 0.1, 1.0}
        assert set(world.path_of.values()) == set(tree.flatten(world.case.parameters))
