"""Settings that must stand before jax is imported, and the fixtures that more than one test file uses."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Eight devices on the CPU: tests of meshes run in this process. LLVM need not polish what runs for milliseconds.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # here: what one process has compiled, those that it starts need not
    programs = tempfile.TemporaryDirectory(prefix="programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # tests that compile for TPUs have none
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers, each with a thread for every core, get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import bpe  # noqa: E402
import qwen_bpe  # noqa: E402
import tekken_bpe  # noqa: E402


@pytest.fixture(scope="session")
def ibims1() -> Path:
    """Twenty real images with intrinsics and depths, beside the repository."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "ibims1"
    if not folder.is_dir():
        pytest.skip("no iBims-1 subset: it is expected in shared/data/ibims1 beside the repository")
    return folder


@pytest.fixture(scope="session")
def qwen_tokenizer_dir() -> Path:
    """Hugging Face folder with the real Qwen2.5 vocabulary."""
    try:
        return qwen_bpe.tokenizer_folder()
    except bpe.Unavailable as reason:
        pytest.skip(f"no Qwen2.5 vocabulary: {reason}")


@pytest.fixture(scope="session")
def tekken_tokenizer_dir() -> Path:
    """Hugging Face folder with the real Tekken vocabulary, Pixtral's."""
    try:
        return tekken_bpe.tokenizer_folder()
    except bpe.Unavailable as reason:
        pytest.skip(f"no Tekken vocabulary: {reason}")


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Folder of a small synthetic data set, see worlds.py."""
    import worlds  # not at the top: it needs a second, and most files do not need it

    return worlds.render(tmp_path_factory.mktemp("scenes"))
