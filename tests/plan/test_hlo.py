"""Collectives in the text of programs: made ones, and one that XLA has compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from depthlm_jax.plan import hlo

TPU_TEXT = """HloModule jit_step

%condition.1 (p: (s32[], bf16[8,16])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.7), direction=LT
}

%piece.1 (p: bf16[1,16]) -> bf16[8,16] {
  %all-gather.1 = bf16[8,16]{1,0:T(8,128)} all-gather(%p), channel_id=3, dimensions={0}
}

%piece.2 (p: bf16[1,16]) -> bf16[8,16] {
  %all-gather.2 = bf16[8,16]{1,0:T(8,128)} all-gather(%p), channel_id=3, dimensions={0}
}

%body.1 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %kernel = (f32[4]{0}) custom-call(%x), frontend_attributes={kernel_metadata={
}
}, custom_call_target="tpu_custom_call"
  %fusion.1 = bf16[8,16]{1,0} fusion(%p), kind=kCustom, calls=%piece.1
  %fusion.2 = bf16[8,16]{1,0} fusion(%p), kind=kCustom, calls=%piece.2
  %all-reduce.1 = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), channel_id=4, metadata={op_name="jit(step)/dot"}
}

ENTRY %main.9 (p: bf16[1,16]) -> bf16[8,16] {
  %while.1 = (s32[], bf16[8,16]) while(%t), condition=%condition.1, body=%body.1
  %collective-permute.1 = bf16[2,16]{1,0} collective-permute(%p), channel_id=5
}
"""


def test_loops_count_their_turns_and_pieces_of_one_collective_count_once():
    found = hlo.by_kind(hlo.collectives(TPU_TEXT))
    assert found == {
        "all-gather": {"count": 7, "bytes": 7 * 8 * 16 * 2},
        "all-reduce": {"count": 7, "bytes": 7 * (4 + 6) * 4},
        "collective-permute": {"count": 1, "bytes": 64},
    }
    reduced = next(one for one in hlo.collectives(TPU_TEXT) if one.kind == "all-reduce")
    assert reduced.source == "jit(step)/dot" and reduced.sent_bytes == 2 * reduced.bytes
    assert (8, 16) in hlo.arrays(TPU_TEXT)


@pytest.mark.parametrize("turns", [1, 5])
def test_a_compiled_program_sends_what_its_loop_says(turns):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x", None), ()))

    def step(weights, x):
        def layer(x, _):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(weights * x.sum(), whole)), None

        return jax.lax.scan(layer, x, length=turns)[0]

    arguments = [jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=place) for place in (split, whole)]
    text = jax.jit(step).lower(*arguments).compile().as_text()
    gathers = hlo.by_kind(hlo.collectives(text))["all-gather"]
    assert gathers == {"count": turns, "bytes": turns * 64 * 64 * 4} or gathers["count"] == 1  # moved out of the loop
