"""Low-rank factors: against kernels that they are merged into, and against `peft` in PyTorch."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import tiny
import torch

from depthlm_jax import hf, tree
from depthlm_jax.config import Lora
from depthlm_jax.errors import InputError
from depthlm_jax.models import lora, registry

PATTERNS = {  # of vision and decoder
    "qwen2_5_vl": r"visual/blocks/(attn/qkv|attn/proj|mlp/up_proj)|model/layers/.*_proj",
    "pixtral": r"vision_tower/.*/(q_proj|down_proj)|multi_modal_projector/linear_1|language_model/.*/(v|o|gate)_proj",
}
LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-4


@pytest.fixture(scope="module", params=tiny.ONE_OF_EACH)
def case(request, tmp_path_factory) -> tiny.Case:
    return tiny.build(tiny.EVERY_MODEL[request.param], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def settings(case) -> Lora:
    return Lora(PATTERNS[case.family], rank=3, alpha=5.0)


@pytest.fixture(scope="module")
def network(case, settings) -> registry.Network:
    return registry.build(case.family, case.config, low_rank=settings)


@pytest.fixture(scope="module")
def parameters(case, network) -> dict:
    """The model's weights with random factors, none of them zero."""
    rng = np.random.default_rng(0)
    factors = {
        rule.path: jnp.asarray(rng.normal(size=network.shapes[rule.path]).astype(np.float32)) / 10
        for rule in network.lora_rules
    }
    return tree.unflatten(tree.flatten(case.parameters) | factors)


@pytest.fixture(scope="module")
def rows(case):
    return tiny.examples(case)


@pytest.fixture(scope="module")
def batch(case, rows):
    return tiny.pack_rows(case, [[example.sample for example in row] for row in rows])


@pytest.fixture(scope="module")
def logits(network, parameters, batch):
    return np.asarray(jax.jit(network.logits)(parameters, batch))


def test_factors_begin_as_nothing(case, network, batch):
    started = tree.flatten(network.init(jax.random.key(0)))
    factors = {path: value for path, value in started.items() if path.endswith(lora.FACTORS)}
    assert factors.keys() == {rule.path for rule in network.lora_rules}
    for path, value in factors.items():
        width = value.shape[-2]
        if path.endswith("lora_b"):
            assert not value.any()
        else:
            assert 0.8 / width**0.5 < np.abs(value).max() <= 1 / width**0.5
    parameters = tree.unflatten(tree.flatten(case.parameters) | factors)
    found, plain = (jax.jit(n.logits) for n in (network, case.network))
    np.testing.assert_array_equal(found(parameters, batch), plain(case.parameters, batch))


def merged(parameters: dict, network: registry.Network, settings: Lora) -> dict:
    flat = {path: np.asarray(value) for path, value in tree.flatten(parameters).items()}
    out = {rule.path: flat[rule.path] for rule in network.rules}
    for rule in network.rules:
        layer = rule.path.removesuffix("/kernel")
        if f"{layer}/lora_a" in flat:
            factors = flat[f"{layer}/lora_a"], flat[f"{layer}/lora_b"]
            out[rule.path] = lora.merged(flat[rule.path], *factors, settings, stacked=rule.stacked)
    return out


def test_merged_kernels_say_the_same(case, network, parameters, settings, batch, logits):
    plain = tree.unflatten(merged(parameters, network, settings))
    found = np.asarray(jax.jit(case.network.logits)(plain, batch))
    before = np.asarray(jax.jit(case.network.logits)(case.parameters, batch))
    assert tiny.distance(found, logits) <= LOGITS_TOLERANCE
    assert tiny.distance(before, logits) > 0.1


def adapter_folder(case, network, parameters, settings, folder):
    modules = registry.family(case.family).modules
    table = lora.adapter_rules(network.lora_rules, modules)
    flat = tree.flatten(parameters)
    shapes = {rule.path: network.shapes[rule.path] for rule in table}
    values = ((rule.path, np.asarray(flat[rule.path])) for rule in table)
    hf.write_parameters(folder, table, shapes, np.dtype(np.float32), values)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    targets = lora.targets(table, network.shapes)
    (folder / "adapter_config.json").write_text(json.dumps(lora.adapter_config(settings, targets, "base")))


def test_peft_loads_them_and_says_the_same(case, network, parameters, settings, rows, batch, logits, tmp_path):
    adapter_folder(case, network, parameters, settings, tmp_path)
    model = tiny.PEERS[case.family].model.from_pretrained(case.folder, dtype=torch.float32).eval()
    names = {name for name, _ in model.named_modules()}
    with_factors = peft.PeftModel.from_pretrained(model, tmp_path)
    replaced = {name for name, part in with_factors.base_model.model.named_modules() if hasattr(part, "lora_A")}
    assert len(replaced) == len(json_targets(tmp_path))
    assert replaced <= names
    expected = []
    with torch.no_grad():
        for row in rows:
            said = [(with_factors(**e.torch_inputs).logits[0], e.sample.answer_index_A) for e in row]
            expected.append([logits_TV[index_A] for logits_TV, index_A in said])
    samples = [[example.sample for example in row] for row in rows]
    for ours, theirs in zip(tiny.answers_of(samples, logits), expected, strict=True):
        for our_AV, their_AV in zip(ours, theirs, strict=True):
            assert tiny.distance(our_AV, their_AV) <= LOGITS_TOLERANCE


def json_targets(folder) -> list[str]:
    return json.loads((folder / "adapter_config.json").read_text())["target_modules"]


def test_gradients_are_those_of_the_product(case, network, parameters, settings, batch):
    """d loss / d a = d loss / d W · bᵀ · scale, and likewise for b."""

    def loss_of(logits):
        return jax.jit(jax.grad(lambda p: jnp.sum(jax.nn.log_softmax(logits(p, batch))[..., 5])))

    found = tree.flatten(loss_of(network.logits)(parameters))
    plain = tree.unflatten(merged(parameters, network, settings))
    of_kernels = tree.flatten(loss_of(case.network.logits)(jax.tree.map(jnp.asarray, plain)))
    flat, scale = tree.flatten(parameters), settings.alpha / settings.rank
    for rule in network.lora_rules:
        if not rule.path.endswith("lora_a"):
            continue
        layer = rule.path.removesuffix("/lora_a")
        a, b, w = (np.asarray(x, np.float64) for x in (flat[f"{layer}/lora_a"], flat[f"{layer}/lora_b"],
                                                       of_kernels[f"{layer}/kernel"]))  # fmt: skip
        lead = (a.shape[0],) if rule.stacked else ()
        a, b, w = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, settings.rank, int(np.prod(b.shape[1 + len(lead) :]))), w
        w = w.reshape(len(a), a.shape[1], -1)
        expected = {"lora_a": scale * w @ b.swapaxes(1, 2), "lora_b": scale * a.swapaxes(1, 2) @ w}
        for name, value in expected.items():
            ours = np.asarray(found[f"{layer}/{name}"]).reshape(value.shape)
            assert np.abs(ours - value).max() <= GRADIENT_TOLERANCE * np.abs(value).max(), (layer, name)


def test_every_linear_layer_may_have_factors(case):
    everything = registry.build(case.family, case.config, low_rank=Lora(".*", rank=2))
    hf.tensor_shapes(everything.lora_rules, {path: everything.shapes[path] for path in everything.lora_paths})
    kernels = {rule.path for rule in everything.rules if rule.path.endswith("kernel") and "patch" not in rule.path}
    assert {path.replace("lora_a", "kernel") for path in everything.lora_paths if path.endswith("lora_a")} == kernels


@pytest.mark.parametrize(
    "pattern, says",
    [
        ("model/layers/attn/.*", r"matches no linear layer[\s\S]*the whole path of some of \d+, such as "),
        ("q_proj", r"matches no linear layer"),
        ("(", r"is no regular expression[\s\S]*such as 'model/layers/self_attn"),
    ],
)
def test_bad_patterns(case, pattern, says):
    with pytest.raises(InputError, match=says):
        registry.build(case.family, case.config, low_rank=Lora(pattern))


def test_the_head_may_have_factors(tmp_path):
    case = tiny.build(tiny.MODELS["eight heads share keys, ends full, patch 8"], tmp_path)
    network = registry.build(case.family, case.config, low_rank=Lora("lm_head", rank=2))
    assert [rule.path for rule in network.lora_rules] == ["lm_head/lora_a", "lm_head/lora_b"]
    rng = np.random.default_rng(0)
    factors = {rule.path: rng.normal(size=network.shapes[rule.path]) / 10 for rule in network.lora_rules}
    parameters = tree.unflatten(tree.flatten(case.parameters) | jax.tree.map(jnp.float32, factors))
    batch = tiny.pack_rows(case, [[tiny.example(case, [(3, 5)], seed).sample] for seed in (0, 1)])
    plain = tree.unflatten(merged(parameters, network, Lora("lm_head", rank=2)))
    found, expected = jax.jit(network.logits)(parameters, batch), jax.jit(case.network.logits)(plain, batch)
    assert tiny.distance(found, expected) <= LOGITS_TOLERANCE
