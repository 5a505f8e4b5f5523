"""Every implementation against a softmax over a dense mask in float64: outputs and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from depthlm_jax import sharding
from depthlm_jax.config import Mesh
from depthlm_jax.errors import InputError
from depthlm_jax.models import attention, blockwise
from depthlm_jax.models.attention import Among

BRANCHES = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a batch of two rows."""

    length: int
    heads: int
    key_heads: int
    width: int
    causal: bool = False
    branches: int = 0
    logit_scale: float = 1.0

    def __str__(self) -> str:
        kinds = "-causal" * self.causal + f"-{self.branches}branches" * (self.branches > 0)
        return f"{self.length}x{self.heads}/{self.key_heads}x{self.width}{kinds}"


def draw(case: Case, seed: int, dtype=jnp.float32) -> tuple[list[jax.Array], Among]:
    """Returns q, k, v and the cotangent of the output; and ids and branches as packed rows have them."""
    rng = np.random.default_rng(seed)
    heads = (case.heads, case.key_heads, case.key_heads, case.heads)
    arrays = [jnp.asarray(rng.normal(size=(2, case.length, n, case.width)), dtype) for n in heads]
    arrays[0] = arrays[0] * case.logit_scale
    ids, branch = np.zeros((2, 2, case.length), np.int32)
    for row in range(2):
        ends = np.sort(rng.choice(np.arange(1, case.length), size=5, replace=False))
        for number, (start, stop) in enumerate(zip(ends[:-1], ends[1:], strict=True), start=1):
            ids[row, start:stop] = number % 4  # padding before, behind and between the segments
            branch[row, start:stop] = np.sort(rng.integers(0, case.branches + 1, stop - start)) * (number % 4 > 0)
    arrays[3] = arrays[3] * jnp.asarray(ids[:, :, None, None] > 0, dtype)  # no loss depends on padding
    return arrays, Among(jnp.asarray(ids), jnp.asarray(branch) if case.branches else None, case.causal)


def without_padding(arrays: list, among: Among) -> list[np.ndarray]:
    """Returns the arrays with zeros where padding stands: what it attends to means nothing."""
    real_BT11 = np.asarray(among.ids_BT > 0)[:, :, None, None]
    return [np.where(real_BT11, np.asarray(x), 0) for x in arrays]


def dense_mask(among: Among) -> np.ndarray:
    rows, length = among.ids_BT.shape
    branch = np.zeros((rows, length), int) if among.branch_BT is None else among.branch_BT
    mask = np.zeros((rows, length, length), bool)
    for row in range(rows):
        for query in range(length):
            own = np.asarray(among.ids_BT[row]) == int(among.ids_BT[row, query])
            key_branch = np.asarray(branch[row])
            mask[row, query] = own & ((key_branch == 0) | (key_branch == int(branch[row][query])))
            if among.causal:
                mask[row, query, query + 1 :] = False
    return mask


def dense(q, k, v, cotangent, mask) -> list[np.ndarray]:
    """Returns the output, and the gradients of q, k and v."""
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    k_all, v_all = (np.repeat(x, group, axis=2) for x in (k, v))
    logits = np.where(mask[:, None], np.einsum("btnk,bsnk->bnts", q, k_all) * scale, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("btnk,bsnk->bnts", cotangent, v_all)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    shared = [
        np.einsum("bnts,btnk->bsnk", of, x).reshape(*k.shape[:3], group, -1).sum(3)
        for of, x in ((d_logits, q), (weights, cotangent))
    ]
    out = np.einsum("bnts,bsnk->btnk", weights, v_all)
    return [out, np.einsum("bnts,bsnk->btnk", d_logits, k_all), *shared]


def run(attend, arrays, among) -> list[jax.Array]:
    """Returns the output, and the gradients of q, k and v."""

    @jax.jit
    def both(q, k, v, cotangent, among):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, among), q, k, v)
        return [out, *backward(cotangent)]

    return both(*arrays, among)


def check(attend, case: Case, seed: int) -> None:
    arrays, among = draw(case, seed)
    expected = without_padding(dense(*arrays, dense_mask(among)), among)
    found = without_padding(run(attend, arrays, among), among)
    for name, ours, exact in zip(("out", "q", "k", "v"), found, expected, strict=True):
        scale = max(1.0, np.abs(exact).max())  # sums over many queries have larger rounding errors
        np.testing.assert_allclose(ours / scale, exact / scale, rtol=0, atol=1e-5, err_msg=name)


CASES = [
    Case(64, 4, 4, 16),
    Case(160, 2, 2, 32, causal=True, branches=BRANCHES),
    Case(131, 4, 2, 8, causal=True),
    Case(96, 6, 2, 16, branches=BRANCHES),
    Case(96, 2, 1, 80, causal=True, logit_scale=30),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_xla_is_a_softmax_over_the_visible_keys(case):
    check(attention.make("xla", devices=jax.devices()), case, seed=case.length)


@pytest.mark.parametrize("sizes", [(32, 64), (64, 32), (48, 48)], ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("case", [*CASES[:-1], Case(96, 2, 1, 80, causal=True, logit_scale=10)], ids=str)
def test_xla_block_by_block_is_the_same(case, sizes, monkeypatch):
    monkeypatch.setattr(attention, "SHORT", 0)
    for name, size in zip(("CHUNK", "BLOCK"), sizes, strict=True):
        monkeypatch.setattr(blockwise, name, size)
    check(attention.reference, case, seed=case.length + 1)


def test_blocks_of_other_samples_are_not_visited():
    ids_T = jnp.asarray(np.repeat([1, 2, 0, 3, 0], [64, 64, 32, 64, 32]))
    first, last = blockwise.visited(ids_T, 32, 32, causal=False)
    assert list(zip(first.tolist(), last.tolist(), strict=True)) == [
        (0, 2), (0, 2), (2, 4), (2, 4), (8, 0), (5, 7), (5, 7), (8, 0)
    ]  # fmt: skip
    first, last = blockwise.visited(ids_T, 32, 32, causal=True)
    assert (last - first).clip(0).tolist() == [1, 2, 1, 2, 0, 1, 2, 0]


SPLASH_CASES = [
    Case(256, 2, 2, 32),
    Case(160, 4, 2, 32, causal=True, branches=BRANCHES),
    Case(100, 2, 1, 80, branches=BRANCHES),
    Case(520, 2, 2, 16, causal=True, branches=BRANCHES, logit_scale=20),  # five blocks
]


@pytest.mark.parametrize("case", SPLASH_CASES, ids=str)
def test_splash_is_a_softmax_over_the_visible_keys(case):
    attend = attention.make("splash", branches=case.branches, devices=jax.devices(), interpret=True)
    check(attend, case, seed=case.length)


def test_splash_in_bfloat16_is_as_close_as_xla():
    case = Case(256, 2, 1, 64, causal=True, branches=BRANCHES)
    arrays, among = draw(case, seed=5, dtype=jnp.bfloat16)
    exact = without_padding(dense(*arrays, dense_mask(among)), among)
    splash = attention.make("splash", branches=BRANCHES, devices=jax.devices(), interpret=True)
    found = run(splash, arrays, among)
    ours, xla = (
        max(np.abs(a.astype(np.float64) - b).max() for a, b in zip(without_padding(results, among), exact, strict=True))
        for results in (found, run(attention.reference, arrays, among))
    )
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    assert ours < 2 * xla


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_on_a_mesh_each_device_computes_its_rows_and_heads(name):
    mesh = sharding.make_mesh(Mesh(2, 1, 2), jax.devices()[:4], rows=2, heads={"heads": 4, "key_heads": 2})
    case = Case(130, 4, 2, 32, causal=True, branches=BRANCHES)
    divide = sharding.per_device(mesh)
    attend = attention.make(name, branches=BRANCHES, devices=jax.devices(), per_device=divide, interpret=True)
    arrays, among = draw(case, seed=6)
    placed = [jax.device_put(x, sharding.shard(mesh, "BTNK")) for x in arrays]
    among_placed = jax.tree.map(lambda x: jax.device_put(x, sharding.shard(mesh, "BT")), among)
    found = run(attend, placed, among_placed)
    expected = without_padding(dense(*arrays, dense_mask(among)), among)
    for ours, real, exact in zip(found, without_padding(found, among), expected, strict=True):
        np.testing.assert_allclose(real, exact, rtol=0, atol=2e-5)
        assert ours.sharding.shard_shape(ours.shape) == (1, 130, ours.shape[2] // 2, 32)


def test_windows_are_rows_of_their_own():
    rng = np.random.default_rng(7)
    ids = jnp.asarray(rng.integers(0, 3, (2 * 9, 16)), jnp.int32)  # of 2 rows of 9 windows
    arrays = [jnp.asarray(rng.normal(size=(18, 16, 4, 8)), jnp.float32) for _ in range(4)]
    mask = attention.same_id(ids, ids)
    found = run(lambda q, k, v, mask: attention.masked(q, k, v, mask), arrays, mask)
    for ours, exact in zip(found, dense(*arrays, np.asarray(ids)[:, :, None] == np.asarray(ids)[:, None]), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5)


def test_few_queries_over_a_cache():
    rng = np.random.default_rng(8)
    shapes = (2, 3, 4, 8), (2, 20, 2, 8), (2, 20, 2, 8)
    q, k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    seen = rng.random((2, 3, 20)) < 0.5
    seen[:, :, 0] = True
    exact = dense(q, k, v, np.zeros(q.shape), seen)[0]
    np.testing.assert_allclose(attention.masked(q, k, v, jnp.asarray(seen)), exact, rtol=0, atol=1e-5)


def test_long_rows_keep_nothing_of_size_t_by_t():
    rows, length, heads, width = 2, 8192, 2, 16
    abstract = [jax.ShapeDtypeStruct((rows, length, heads, width), jnp.float32)] * 4
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def gradient(q, k, v, cotangent, among):
        return jax.vjp(lambda *qkv: attention.reference(*qkv, among), q, k, v)[1](cotangent)

    compiled = jax.jit(gradient).lower(*abstract, Among(ids, ids, causal=True)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < rows * heads * length * length * 4 / 16
    assert f"{length},{length}]" not in compiled.as_text()


@pytest.mark.parametrize("length, chunk", [(100, 100), (1024, 1024), (2304, 768), (9152, 832), (2 * 1031, 2 * 1031)])
def test_query_chunks_divide_the_length(length, chunk):
    assert attention.query_chunk(length) == chunk
    assert length % chunk == 0


def test_query_chunks_of_cudnn_are_even():
    for length in range(128, 20_000, 128):
        chunk = attention.query_chunk(length, unit=2)
        assert length % chunk == 0 and chunk % 2 == 0 and chunk <= max(attention.MAX_QUERIES, attention.LANES)


@pytest.mark.parametrize(
    "length, block, padded", [(1, 128, 128), (160, 256, 256), (1664, 256, 1792), (2048, 512, 2048), (9152, 512, 9216)]
)
def test_a_large_block_is_worth_little_padding(length, block, padded):
    assert attention.block_of(length) == (block, padded)


def test_blocks_divide_every_length():
    for length in range(1, 10_000, 7):
        block, padded = attention.block_of(length)
        assert padded % block == 0 and padded >= length and block % 128 == 0
        assert padded <= 1.125 * (length + 127)


@dataclasses.dataclass(frozen=True)
class Device:
    """What make reads of a device before it refuses, or accepts a GPU that is not here."""

    platform: str
    device_kind: str
    compute_capability: str = ""


HOPPER, PASCAL = Device("gpu", "NVIDIA H100", "9.0"), Device("gpu", "Tesla P100", "6.0")
AMD, TPU = Device("gpu", "AMD Instinct MI300X", "gfx942"), Device("tpu", "TPU v5 lite")


@pytest.mark.parametrize(
    "name, device, says",
    [
        ("splash", None, ("a kernel for TPUs", "cpu (cpu)")),
        ("splash", HOPPER, ("a kernel for TPUs", "gpu (NVIDIA H100)")),
        ("cudnn", None, ("a kernel for NVIDIA GPUs", "cpu (cpu)")),
        ("cudnn", TPU, ("a kernel for NVIDIA GPUs", "tpu (TPU v5 lite)")),
        ("cudnn", AMD, ("a kernel for NVIDIA GPUs", "gpu (AMD Instinct MI300X)")),
        ("cudnn", PASCAL, ("needs a newer GPU", "compute capability 6.0", "8.0 (Ampere)")),
    ],
)
def test_devices_that_cannot_run_it(name, device, says):
    with pytest.raises(InputError) as error:
        attention.make(name, devices=[device] if device else jax.devices())
    for part in (f"model.attention={name}", *says, "--config.model.attention=xla"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "dtype, width, says",
    [
        (jnp.float32, 64, ("dtype", "float32", "bfloat16", "--config.model.compute_dtype=bfloat16")),
        (jnp.bfloat16, 136, ("136 channels a head", "a multiple of 8 up to 128")),
        (jnp.bfloat16, 12, ("12 channels a head", "a multiple of 8 up to 128")),
    ],
)
def test_what_cudnn_does_not_take(dtype, width, says):
    attend = attention.make("cudnn", devices=[HOPPER])
    x = jax.ShapeDtypeStruct((2, 128, 2, width), dtype)
    with pytest.raises(InputError) as error:
        jax.eval_shape(attend, x, x, x, Among(jax.ShapeDtypeStruct((2, 128), jnp.int32)))
    for part in (*says, "--config.model.attention=xla"):
        assert part in str(error.value)


@pytest.mark.parametrize("length, chunk, padded", [(130, 256, 256), (1664, 832, 1664)])
def test_cudnn_gets_the_mask_of_a_chunk_of_queries(length, chunk, padded):
    mesh = sharding.make_mesh(Mesh(2, 1, 2), jax.devices()[:4], rows=2, heads={"heads": 4, "key_heads": 2})
    attend = attention.make("cudnn", branches=BRANCHES, devices=[HOPPER], per_device=sharding.per_device(mesh))

    def abstract(letters, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.shard(mesh, letters))

    q, k = (abstract("BTNK", jnp.bfloat16, 2, length, heads, 128) for heads in (4, 2))
    ids = abstract("BT", jnp.int32, 2, length)
    gradient = jax.jit(jax.grad(lambda q, k, v, among: attend(q, k, v, among).sum(), argnums=(0, 1, 2)))
    try:
        traced = gradient.trace(q, k, k, Among(ids, ids, causal=True))
    except RuntimeError as error:
        if "cuDNN is not detected" not in str(error):
            raise
        pytest.skip("no cuDNN: it comes with jax[cuda12]; no GPU is needed to lower for one")
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaScaleBiasSoftmax(" in text and "@__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    assert f"tensor<1x1x{chunk}x{padded}xbf16>" in text, "each device has a row, and the mask of its chunk"
    assert f"x{padded}x{padded}x" not in text or chunk == padded


def test_a_name_that_is_none():
    with pytest.raises(InputError, match="unknown model.attention 'flash'") as error:
        attention.make("flash", devices=jax.devices())
    assert "['cudnn', 'splash', 'xla']" in str(error.value)
