import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from depthlm_jax import compiler
from depthlm_jax.errors import InputError
from depthlm_jax.models import attention

ROOT = Path(__file__).parents[1]
TWICE = """
import json, sys, jax, jax.numpy as jnp
from depthlm_jax import compiler
compiler.keep_programs(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.jit(lambda x: jnp.sin(x) @ x, compiler_options=compiler.options("cpu"))(jnp.ones((64, 64))).block_until_ready()
print(json.dumps(hits.count("/jax/compilation_cache/cache_hits")))
"""


def test_compiled_programs_are_found_by_the_next_start(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", TWICE, str(tmp_path / "cache")], env=environment, capture_output=True, text=True,
            timeout=120, check=True,
        )  # fmt: skip
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == 0 < found[1]
    assert list((tmp_path / "cache").iterdir())


def test_a_platform_without_options_gets_none():
    assert compiler.options("cpu") == {} == compiler.options("rocket")
    assert compiler.options("tpu") and compiler.options("gpu")


class Gpu:
    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    def __init__(self, capability: str):
        self.compute_capability = capability


class Tpu:
    platform = "tpu"


@pytest.mark.parametrize(
    ("device", "dtype", "name"),
    [
        (Tpu(), "bfloat16", "splash"), (Tpu(), "float32", "splash"), (Gpu("9.0"), "bfloat16", "cudnn"),
        (Gpu("9.0"), "float32", "xla"), (Gpu("7.5"), "bfloat16", "xla"), (Gpu("gfx942"), "bfloat16", "xla"),
        (jax.devices()[0], "bfloat16", "xla"),
    ],
)  # fmt: skip
def test_auto_is_what_suits_the_device(device, dtype, name):
    assert attention.suited("auto", [device], dtype) == name
    assert attention.suited("xla", [device], dtype) == "xla"


def test_auto_has_to_be_resolved_first():
    with pytest.raises(InputError, match="unknown model.attention 'auto'"):
        attention.make("auto", devices=jax.devices())
