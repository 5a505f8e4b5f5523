"""The splash kernel compiles for real TPUs, forward and backward, without one.

All of them: bash tests/run.sh -m tpu_aot
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from depthlm_jax import sharding
from depthlm_jax.config import Mesh
from depthlm_jax.models import attention
from depthlm_jax.models.attention import Among

pytestmark = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: it comes with jax[tpu]"),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a row of a real model."""

    length: int
    heads: int
    key_heads: int
    width: int
    causal: bool
    branches: int = 0
    dtype: type = jnp.bfloat16

    def __str__(self) -> str:
        kinds = "-causal" * self.causal + f"-{self.branches}branches" * (self.branches > 0)
        kinds += "-float32" * (self.dtype == jnp.float32)
        return f"{self.length}x{self.heads}/{self.key_heads}x{self.width}{kinds}"


CASES = [
    Case(9152, 16, 16, 80, causal=False),  # patches of Qwen2.5-VL
    Case(8192, 16, 16, 64, causal=False),  # patches of Pixtral
    Case(8192, 16, 2, 128, causal=True),  # tokens of Qwen2.5-VL 3B
    Case(8192, 16, 2, 128, causal=True, branches=8),
    Case(2048, 16, 2, 128, causal=True, branches=8, dtype=jnp.float32),
    Case(1664, 28, 4, 128, causal=True, branches=130),
]


@functools.cache
def mesh_of(topology: str) -> jax.sharding.Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sharding.make_mesh(Mesh(2, -1, 2), list(devices), rows=len(devices) // 2, heads={"heads": 2})


def compile_gradient(case: Case, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """Returns the compiled output and gradients of q, k and v, for a row a device."""
    devices = list(mesh.devices.flat)
    divide = sharding.per_device(mesh)
    attend = attention.make("splash", branches=case.branches, devices=devices, per_device=divide)

    def abstract(letters: str, dtype, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(devices) // 2, *shape), dtype, sharding=sharding.shard(mesh, letters))

    q, k = (abstract("BTNK", case.dtype, case.length, heads, case.width) for heads in (case.heads, case.key_heads))
    ids = abstract("BT", jnp.int32, case.length)

    def both(q, k, v, cotangent, among):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, among), q, k, v)
        return out, backward(cotangent)

    return jax.jit(both).lower(q, k, k, q, Among(ids, ids if case.branches else None, case.causal)).compile()


EVERY = [(topology, case) for topology in ("v5e:4x4", "v6e:4x4") for case in CASES]


@pytest.mark.parametrize(
    ("topology", "case"), [EVERY[2], *(pytest.param(*one, marks=pytest.mark.slow) for one in EVERY if one != EVERY[2])],
    ids=str,
)  # fmt: skip
def test_splash_compiles_and_keeps_nothing_of_size_t_by_t(topology, case):
    compiled = compile_gradient(case, mesh_of(topology))
    text, padded = compiled.as_text(), attention.block_of(case.length)[1]
    assert text.count('custom_call_target="tpu_custom_call"') == 3  # forward, and backward of q, and of k and v
    assert f"{padded},{padded}]" not in text
    assert not any(name in text for name in ("all-gather(", "all-reduce(", "all-to-all(", "collective-permute("))
    logits_of_heads = case.heads // 2 * padded**2 * 4
    assert padded < 2048 or compiled.memory_analysis().temp_size_in_bytes < logits_of_heads / 4
