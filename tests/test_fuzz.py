"""Thousands of broken inputs: each is refused by a named error, or read; nothing else, and nothing hangs."""

import dataclasses
import json

import ml_collections
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depthlm_jax import config as config_module
from depthlm_jax import hf, recipes
from depthlm_jax.cli import command
from depthlm_jax.config import Source, default_config
from depthlm_jax.data import records, tasks
from depthlm_jax.errors import InputError

MANY = settings(
    derandomize=True, deadline=5_000, max_examples=2_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LEAVES = sorted(config_module.flatten(config_module.parse(default_config())))
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text("ab_1ü ", max_size=5), st.integers(), max_size=2),  # ConfigDict itself takes no dots
)  # fmt: skip


@MANY
@given(st.dictionaries(st.sampled_from(LEAVES), VALUES, min_size=1, max_size=3))
def test_any_value_of_any_field_is_taken_or_refused_by_name(changes):
    recipe = default_config().to_dict()
    for path, value in changes.items():
        *sections, name = path.split(".")
        node = recipe
        for section in sections:
            node = node[section]
        node[name] = value
    try:
        parsed = config_module.parse(ml_collections.ConfigDict(recipe))
    except InputError as error:
        assert "config: " in str(error)
    else:
        assert config_module.from_dict(dataclasses.asdict(parsed)) == parsed


WORDS = st.text(alphabet="configtrandseuxml._-=[]0123456789e,'{}() \x00ü", max_size=40)


@MANY
@given(st.sampled_from([*LEAVES, "train", "nothing", ""]), WORDS)
def test_any_override_is_read_or_refused_by_name(path, text):
    recipe = str(recipes.RECIPES / "demo.py")
    arguments = [f"--config={recipe}", f"--config.{path}={text}", "--output=/nowhere/x", "--help"]
    assert command.run("preview", "", arguments) in (0, 1, 2)


NUMBERS = st.text(alphabet="0123456789.,-+eE mkc<>/think answer\n\x00∞½", max_size=60)


@MANY
@given(st.one_of(st.text(max_size=200), NUMBERS), st.sampled_from(list(tasks.TASKS)))
def test_any_answer_is_a_number_or_none(text, task):
    for parse in (tasks.parse_answer, tasks.parse_number):
        value = parse(text, task)
        assert value is None or (isinstance(value, float) and np.isfinite(value))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple:
    """Returns the bytes of a safetensors file, its rules and shapes, and a folder for broken ones."""
    rules, shapes = [hf.Rule("a/kernel", "a.weight", hf.SAME, "VD")], {"a/kernel": (2, 3)}
    content = safetensors.numpy.save({"a.weight": np.ones((2, 3), np.float32)})
    return content, rules, shapes, tmp_path_factory.mktemp("weights")


@MANY
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=6), st.integers(0, 200), st.binary())
def test_any_weights_are_read_or_refused_by_name(sound, changes, length, more):
    content, rules, shapes, folder = sound
    broken = bytearray(content)
    for place, value in changes:
        broken[place % len(broken)] = value
    (folder / "model.safetensors").write_bytes(bytes(broken[: length if length % 3 else None]) + more[: length % 2])
    try:
        weights = hf.open_folder(folder, rules, shapes)
        assert weights.read("a/kernel", (slice(None), slice(None))).shape == (2, 3)
    except InputError as error:
        assert str(folder) in str(error)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(["image", "intrinsics", "pixel_coords", "depth", "depth_kind", "pose", "scene", "dataset"])


@settings(MANY, max_examples=1_000)
@given(st.dictionaries(FIELDS, JSON, max_size=8), st.binary(max_size=30), st.booleans())
def test_any_line_is_a_record_or_refused_by_name(tmp_path_factory, fields, noise, is_json):
    file = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    line = json.dumps(fields).encode() if is_json else noise.replace(b"\n", b"")
    file.write_bytes(line + b"\n")
    file.with_name(f"{file.name}.index").unlink(missing_ok=True)
    try:
        source = records.open_source(Source(path=str(file)))
        source[0]
    except InputError as error:
        assert "fuzz.jsonl" in str(error)
