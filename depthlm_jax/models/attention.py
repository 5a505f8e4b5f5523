"""Attention behind one function: softmax(q·k / √K) v over the keys that `Among` names, softmax in float32.

name    runs on          keeps
xla     everything       a block of queries × keys for each head
splash  TPU              blocks on the chip
cudnn   NVIDIA GPU       blocks on the chip; before Hopper a chunk of queries × T, the mask; bfloat16
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from depthlm_jax.errors import InputError
from depthlm_jax.models import blockwise, cudnn

SHORT = 256  # tokens of a row: up to it the mask of the whole row is no concern
MAX_QUERIES, MIN_QUERIES = 1024, 128  # of a chunk: below the one memory is no concern, below the other speed is
LANES = 128  # the kernels get rows whose length is a multiple of it
BLOCKS = (512, 384, 256, LANES)  # sides of a block of the splash kernel, best first
MOST_PADDING = 1 / 8  # of a row, for the sake of a larger block
PADDING_ID = -1  # of the slots that lengthen a row; no slot of a batch has it
FORBIDDEN = 2.0**30  # taken from the logit of another branch's key; exact in bfloat16
CUDNN_WIDTH, CUDNN_WIDTH_UNIT = 128, 8
CUDNN_CAPABILITY = 8.0  # Ampere: older GPUs have no fused attention
FIX = "set --config.model.attention=xla"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Among:
    """Which keys a query sees: those with its own id; of these, those of branch 0 or its own; none after itself."""

    ids_BT: jax.Array  # sample or image number; 0 = padding, whose output means nothing
    branch_BT: jax.Array | None = None  # None: all are of one branch
    causal: bool = dataclasses.field(default=False, metadata={"static": True})


Attend = Callable[[jax.Array, jax.Array, jax.Array, Among], jax.Array]  # (q_BTNK, k_BTNK, v_BTNK, among) → out_BTNK
PerDevice = Callable[[Callable, Sequence[str], str], Callable]  # (function, in_letters, out_letters) → function


def whole(function: Callable, in_letters: Sequence[str], out_letters: str) -> Callable:
    """Returns the function: on one device it gets the arrays whole."""
    return function


def make(
    name: str, *, branches: int = 0, devices: Sequence[jax.Device], per_device: PerDevice = whole, interpret=False
) -> Attend:
    """Returns attend(q_BTNK, k_BTNK, v_BTNK, among), where k and v may have fewer heads (GQA).

    Args:
      name: key of IMPLEMENTATIONS.
      branches: largest number in `branch_BT`; 0 where there is none but 0. Keys of a larger one would
        be seen by all.
      devices: that it will run on.
      per_device: `sharding.per_device(mesh)` where arrays are divided: XLA cannot divide a kernel by itself.
      interpret: run a TPU kernel on another platform, slowly, for tests.

    Raises:
      InputError: the devices cannot run it; or, from attend, the sizes or the dtype do not suit it.
    """
    if name not in IMPLEMENTATIONS:
        raise InputError(
            f"config: unknown model.attention {name!r}", found=name, expected=f"one of {sorted(IMPLEMENTATIONS)}",
            fix="set --config.model.attention",
        )  # fmt: skip
    return IMPLEMENTATIONS[name](branches, devices, per_device, interpret)


def suited(name: str, devices: Sequence[jax.Device], dtype: str) -> str:
    """Returns the implementation that "auto" stands for on these devices, in this dtype; another name as it is."""
    if name != "auto":
        return name
    platform = devices[0].platform
    if platform == "gpu" and dtype == "bfloat16" and _capability(devices[0]) >= CUDNN_CAPABILITY:
        return "cudnn"
    return "splash" if platform == "tpu" else "xla"


def masked(q_BTNK: jax.Array, k_BSNK: jax.Array, v_BSNK: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Returns out_BTNK over the keys where the mask is true; fewer key heads are shared (GQA)."""
    return jax.nn.dot_product_attention(q_BTNK, k_BSNK, v_BSNK, mask=mask_BTS[:, None], implementation="xla")


def reference(q_BTNK: jax.Array, k_BTNK: jax.Array, v_BTNK: jax.Array, among: Among) -> jax.Array:
    """Returns out_BTNK in plain XLA: short rows at once, longer ones block by block."""
    if q_BTNK.shape[1] <= SHORT:
        return masked(q_BTNK, k_BTNK, v_BTNK, visible(among, np.arange(q_BTNK.shape[1]), among))
    branch_BT = jnp.zeros_like(among.ids_BT) if among.branch_BT is None else among.branch_BT
    return blockwise.attend(q_BTNK, k_BTNK, v_BTNK, among.ids_BT, branch_BT, among.causal)


def in_chunks(attend: Callable, q_BTNK, k_BTNK, v_BTNK, among: Among, chunk: int) -> jax.Array:
    """Returns out_BTNK, made by `attend(q_BQNK, k, v, mask_BQT)` from every `chunk` queries, which has to divide T."""
    rows, length = q_BTNK.shape[:2]

    def attend_chunk(queries: tuple[jax.Array, Among, jax.Array]) -> jax.Array:
        q_BQNK, of_queries, slots_Q = queries
        return attend(q_BQNK, k_BTNK, v_BTNK, visible(of_queries, slots_Q, among))

    if chunk == length:
        return attend_chunk((q_BTNK, among, np.arange(length)))
    q, of_queries = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0), (q_BTNK, among)
    )
    slots = jnp.arange(length).reshape(-1, chunk)
    out = jax.lax.map(jax.checkpoint(attend_chunk), (q, of_queries, slots))
    return jnp.moveaxis(out, 0, 1).reshape(q_BTNK.shape)


def visible(queries: Among, slots_Q: jax.Array, keys: Among) -> jax.Array:
    """Returns mask_BQT: the keys that each query sees; `slots_Q` is where the queries stand in their row."""
    mask_BQT = same_id(queries.ids_BT, keys.ids_BT)
    if keys.branch_BT is not None:
        mask_BQT &= same_id(queries.branch_BT, keys.branch_BT) | (keys.branch_BT == 0)[:, None, :]
    if keys.causal:
        mask_BQT &= slots_Q[:, None] >= np.arange(keys.ids_BT.shape[1])
    return mask_BQT


def same_id(queries_BT: jax.Array, keys_BS: jax.Array) -> jax.Array:
    """Returns mask_BTS: true where query and key carry the same id."""
    return queries_BT[:, :, None] == keys_BS[:, None, :]


def query_chunk(length: int, unit: int = 1) -> int:
    """Returns the queries of a chunk: the length's largest divisor up to MAX_QUERIES, or all of it if that is small.

    Only multiples of `unit` count, which has to divide the length.
    """
    divisor = max((d for d in range(unit, min(length, MAX_QUERIES) + 1, unit) if length % d == 0), default=length)
    return divisor if divisor >= MIN_QUERIES else length


def _make_xla(branches: int, devices: Sequence, per_device: PerDevice, interpret: bool) -> Attend:
    return per_device(reference, ("BTNK", "BTNK", "BTNK", "BT"), "BTNK")


def _make_splash(branches: int, devices: Sequence, per_device: PerDevice, interpret: bool) -> Attend:
    """The splash kernel masks by order and by equal ids. Other branches are forbidden through channels beside the K
    of a head: a key has a one in the channel of its branch, a query −FORBIDDEN in all channels but its own. Branch 0
    has no channel: its keys are forbidden to nobody, and its queries see no other branch.
    """
    if devices[0].platform != "tpu" and not interpret:
        raise InputError("model.attention=splash is a kernel for TPUs", found=_name(devices), expected="TPUs", fix=FIX)

    def attend_part(q_BTNK, k_BTNK, v_BTNK, among: Among) -> jax.Array:
        block, padded = block_of(q_BTNK.shape[1])
        q, k, v, longer = _lengthen(padded, q_BTNK, k_BTNK, v_BTNK, among)
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)  # the kernel does not
        if branches and longer.branch_BT is not None:
            own_BTK = jax.nn.one_hot(longer.branch_BT - 1, branches, dtype=q.dtype)
            q, k = _widen(q, FORBIDDEN * (own_BTK - 1)), _widen(k, own_BTK)
        kernel = _splash_kernel(padded, q.shape[2], block, among.causal, interpret)
        segments = splash_attention.SegmentIds(longer.ids_BT, longer.ids_BT)
        out_BNTK = jax.vmap(kernel)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), segments)
        return jnp.swapaxes(out_BNTK, 1, 2)[:, : q_BTNK.shape[1]]

    return per_device(attend_part, ("BTNK", "BTNK", "BTNK", "BT"), "BTNK")


def _splash_kernel(length: int, heads: int, block: int, causal: bool, interpret: bool) -> Callable:
    """Made anew at every trace: its constants belong to the trace."""
    kind = splash_attention.CausalMask if causal else splash_attention.FullMask
    # Two backward kernels: the fused one writes the gradient of the queries once for every block of keys.
    sizes = splash_attention.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    mask = splash_attention.MultiHeadMask([kind((length, length))] * heads)
    return splash_attention.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=blockwise.ATTENDED,
        interpret=interpret,
    )


def block_of(length: int) -> tuple[int, int]:
    """Returns a block's side, and the length, its multiple, that a row is brought to: the best with little padding."""
    limit = (1 + MOST_PADDING) * _round_up(length, LANES)
    return next((block, _round_up(length, block)) for block in BLOCKS if _round_up(length, block) <= limit)


def _make_cudnn(branches: int, devices: Sequence, per_device: PerDevice, interpret: bool) -> Attend:
    """From Hopper on each sample by itself; older GPUs, and rows with branches, get a mask, a chunk at a time."""
    if devices[0].platform != "gpu" or not _capability(devices[0]):
        raise InputError(
            "model.attention=cudnn is a kernel for NVIDIA GPUs", found=_name(devices), expected="NVIDIA GPUs", fix=FIX
        )
    if _capability(devices[0]) < CUDNN_CAPABILITY:
        raise InputError(
            "model.attention=cudnn needs a newer GPU", fix=FIX,
            found=f"{_name(devices)} of compute capability {devices[0].compute_capability}",
            expected=f"compute capability {CUDNN_CAPABILITY} (Ampere) or more",
        )  # fmt: skip

    def attend_chunk(q_BQNK, k_BTNK, v_BTNK, mask_BQT) -> jax.Array:
        mask_B1QT = mask_BQT[:, None]
        return jax.nn.dot_product_attention(q_BQNK, k_BTNK, v_BTNK, mask=mask_B1QT, implementation="cudnn")

    by_samples = cudnn.dot_product_attention is not None and _capability(devices[0]) >= cudnn.CAPABILITY

    def attend_part(q_BTNK, k_BTNK, v_BTNK, among: Among) -> jax.Array:
        if by_samples and (not branches or among.branch_BT is None):
            return cudnn.attend(q_BTNK, k_BTNK, v_BTNK, among.ids_BT, among.causal)
        padded = _round_up(q_BTNK.shape[1], LANES)
        longer = _lengthen(padded, q_BTNK, k_BTNK, v_BTNK, among)
        chunk = query_chunk(padded, unit=2)  # cuDNN differentiates even lengths only
        return in_chunks(attend_chunk, *longer, chunk)[:, : q_BTNK.shape[1]]

    def attend(q_BTNK, k_BTNK, v_BTNK, among: Among) -> jax.Array:
        _check_cudnn(q_BTNK)
        return per_device(attend_part, ("BTNK", "BTNK", "BTNK", "BT"), "BTNK")(q_BTNK, k_BTNK, v_BTNK, among)

    return attend


def _check_cudnn(q_BTNK: jax.Array) -> None:
    width = q_BTNK.shape[-1]
    if q_BTNK.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(
            "model.attention=cudnn does not compute in this dtype", found=q_BTNK.dtype, expected="bfloat16",
            fix=f"set --config.model.compute_dtype=bfloat16, or {FIX}",
        )  # fmt: skip
    if width > CUDNN_WIDTH or width % CUDNN_WIDTH_UNIT:
        raise InputError(
            "model.attention=cudnn does not take heads of this width", found=f"{width} channels a head",
            expected=f"a multiple of {CUDNN_WIDTH_UNIT} up to {CUDNN_WIDTH}", fix=FIX,
        )  # fmt: skip


def _capability(device: jax.Device) -> float:
    """Returns 8.0 for '8.0', and 0 for the names that AMD uses."""
    text = device.compute_capability
    return float(text) if text.replace(".", "").isdigit() else 0.0


def _name(devices: Sequence[jax.Device]) -> str:
    return f"{devices[0].platform} ({devices[0].device_kind})"


def _round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _lengthen(length: int, q_BTNK, k_BTNK, v_BTNK, among: Among) -> tuple[jax.Array, jax.Array, jax.Array, Among]:
    """Returns the arrays with T brought to `length` by slots that see, and are seen by, each other only."""
    more = length - q_BTNK.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (q_BTNK, k_BTNK, v_BTNK))
    return q, k, v, jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more)), constant_values=PADDING_ID), among)


def _widen(x_BTNK: jax.Array, more_BTK: jax.Array) -> jax.Array:
    more_BTNK = jnp.broadcast_to(more_BTK[:, :, None], (*x_BTNK.shape[:3], more_BTK.shape[-1]))
    return jnp.concatenate([x_BTNK, more_BTNK], axis=-1)


IMPLEMENTATIONS: dict[str, Callable[[int, Sequence, PerDevice, bool], Attend]] = {
    "xla": _make_xla,
    "splash": _make_splash,
    "cudnn": _make_cudnn,
}
