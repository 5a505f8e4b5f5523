import importlib.util

import pytest

from depthlm_jax import __main__ as program
from depthlm_jax import chips
from depthlm_jax.errors import InputError
from depthlm_jax.plan import search, topology

NO_LIBTPU = importlib.util.find_spec("libtpu") is None


@pytest.mark.parametrize("name", ["v5e-17", "v5p-100", "h100-8", "v5e", "3 slices", "0xv5e-16"])
def test_an_unknown_slice_is_named_with_those_near_it(name):
    with pytest.raises(InputError, match="no TPU slice(.|\n)*did you mean v") as error:
        topology.find(name)
    assert repr(name) in str(error.value) and "v5e-256" in str(error.value)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"no TPU compiler(.|\n)*pip install 'jax\[tpu\]=="):
        topology.find("v5e-16")


def test_names_are_those_of_the_cloud():
    for name in ("v5e-16", "v5e-256", "v5p-8", "v5p-1024", "v6e-8", "v6e-256", "v4-8", "tpu7x-8"):
        assert name in topology.NAMES


@pytest.mark.tpu_aot
@pytest.mark.skipif(NO_LIBTPU, reason="no libtpu: it comes with jax[tpu]")
@pytest.mark.parametrize(
    ("name", "devices", "slices"),
    [("v5e-16", 16, 1), ("v5p-128", 64, 1), ("v6e-256", 256, 1), ("v4-64", 32, 1), ("tpu7x-8", 8, 1),
     ("2xv5e-16", 32, 2)],
)  # fmt: skip
def test_slices_have_their_chips(name, devices, slices):
    found = topology.find(name)
    assert len(found.devices) == devices
    indexes = {device.slice_index for device in found.devices if hasattr(device, "slice_index")}
    assert max(1, len(indexes)) == slices == found.slices
    assert chips.chip_of(found.devices[0].device_kind) == found.chip


def test_a_chip_is_known_by_the_name_of_its_device():
    assert chips.chip_of("TPU v5 lite") == chips.CHIPS["v5e"]
    assert chips.chip_of("TPU v5") == chips.CHIPS["v5p"]
    assert chips.chip_of("NVIDIA H100 80GB HBM3") == chips.CHIPS["h100"]
    assert chips.chip_of("cpu") is None


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--config=configs/qwen2_5_vl_3b.py"], 2, "--topology is needed: one of v4-8"),
        (["--topology=v5e-16"], 2, "--config is needed"),
        (["--config=configs/qwen2_5_vl_3b.py", "--topology=v5e-15"], 1, "did you mean v5e-16"),
    ],
)
def test_wrong_usage_says_what_is_wrong(capsys, arguments, status, text):
    assert program.main(["plan", *arguments]) == status
    assert text in capsys.readouterr().err


class Program:
    def __init__(self, fits: bool, micro_batches: int):
        self.fits, self.micro_batches = fits, micro_batches


@pytest.mark.parametrize(
    ("fits", "expected"),
    [
        ({("attended", 8), ("full", 8), ("attended", 4)}, [("none", 8), ("dots", 8), ("attended", 8), ("attended", 4),
                                                           ("attended", 2)]),
        (set(), [("none", 8), ("dots", 8), ("attended", 8), ("full", 8)]),
        ({("none", 8), ("none", 4), ("none", 2), ("none", 1)}, [("none", 8), ("none", 4), ("none", 2), ("none", 1)]),
    ],
)  # fmt: skip
def test_search_asks_for_the_least_recomputation_and_then_for_rows(fits, expected):
    """The compiler is stood in for: which programs it accepts is what the cases are about."""
    from depthlm_jax.config import Config

    asked = []

    def compile_(config):
        micro = config.train.gradient_accumulation_steps or 8
        asked.append((config.model.remat, micro))
        return Program(asked[-1] in fits, micro)

    assert len(list(search.tries(Config(), compile_))) == len(expected)
    assert asked == expected
