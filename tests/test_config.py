import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from depthlm_jax import config as config_module
from depthlm_jax import config_errors, config_rules, same_run
from depthlm_jax.config import Config, default_config, parse
from depthlm_jax.errors import InputError

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def changed(path: str, value):
    recipe = default_config()
    *sections, name = path.split(".")
    node = recipe
    for section in sections:
        node = node[section]
    with node.unlocked(), node.ignore_type():
        node[name] = config_module.sources(value) if path == "data.sources" and type(value) is dict and value else value
    return recipe


def refusal(path: str, value) -> str:
    with pytest.raises(InputError) as error:
        parse(changed(path, value))
    return str(error.value)


def test_defaults_are_parsed_to_the_dataclass_defaults():
    assert parse(default_config()) == Config()


def test_a_change_arrives_and_an_integer_serves_as_float():
    config = parse(changed("optim.weight_decay", 1))
    assert config.optim.weight_decay == 1.0 and type(config.optim.weight_decay) is float
    assert parse(changed("data.geometry.crop_width", [3, 5])).data.geometry.crop_width == (3, 5)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("optim.learning_rat", "optim.learning_rate"),
        ("data.geometry.focal", "data.geometry.focal_px"),
        ("evaluation", "eval"),
        ("train.saves_steps", "train.save_steps"),
    ],
)
def test_unknown_field_names_the_nearest(path, nearest):
    text = refusal(path, 1)
    assert f"config: unknown field {path!r}" in text
    assert f"did you mean {nearest!r}?" in text


@pytest.mark.parametrize(
    ("path", "value", "found", "expected"),
    [
        ("train.max_steps", 1.5, "1.5 of type float", "int"),
        ("train.max_steps", True, "True of type bool", "int"),
        ("model.remat", "ful", "'ful'", "full or attended or dots or none"),
        ("optim.learning_rate", "1e-5", "'1e-5' of type str", "float"),
        ("model.hf_config", "config.json", "'config.json' of type str", "dict"),
        ("data.geometry", "train.jsonl", "'train.jsonl' of type str", "a section"),
        ("data.sources", "train.jsonl", "'train.jsonl' of type str", "named sections, at least one"),
        ("data.sources", {}, "{} of type dict", "named sections, at least one"),
        ("data.sources.main.weight", -0.1, "-0.1", "0 to "),
        ("data.sources.main.depth_kind", "Z", "'Z'", "z or ray"),
        ("data.sources.main.aspect_jitter", (1.3, 1.0), "(1.3, 1.0)", "two numbers (smallest, largest)"),
        ("data.reference.mode", "arow", "'arow'", "arrow or dot or cross or square or text_raw or text_norm"),
        ("data.geometry.mode", "oficial", "'oficial'", "corrected or official"),
        ("data.label_kind", "Z", "'Z'", "z or ray or official"),
        ("train.logging_steps", 0, "0", "1 to "),
        ("data.reference.questions", -1, "-1", "1 to "),
        ("data.geometry.focal_px", -5.0, "-5.0", "0 to "),
        ("data.geometry.focal_px", float("nan"), "nan", "0 to "),
        ("optim.warmup_ratio", 2.0, "2.0", "0 to 1"),
        ("optim.max_grad_norm", 0.0, "0.0", "1e-12 to "),
        ("data.read_threads", -1, "-1", "0 to "),
        ("data.geometry.crop_width", (5, 3), "(5, 3)", "two whole numbers (smallest, largest)"),
        ("data.geometry.crop_width", (5,), "(5,)", "two whole numbers (smallest, largest)"),
        ("data.geometry.crop_height", (1.5, 2.5), "(1.5, 2.5)", "two whole numbers (smallest, largest)"),
        ("data.geometry.crop_height", ("a", "b"), "('a', 'b')", "two whole numbers (smallest, largest)"),
        ("data.geometry.crop_height", 700, "700", "two whole numbers (smallest, largest)"),
    ],
)
def test_bad_value_is_named_with_what_was_found_and_expected(path, value, found, expected):
    lines = [line.strip() for line in refusal(path, value).splitlines()]
    assert lines[0] == f"config: bad value of {path}"
    assert lines[1] == f"found:    {found}"
    assert lines[2].removeprefix("expected: ").startswith(expected)
    assert f"--config.{path}=" in lines[3]


def test_missing_field_is_named():
    recipe = default_config()
    with recipe.unlocked():
        del recipe.train["seed"]
    with pytest.raises(InputError, match=r"config: train\.seed is missing"):
        parse(recipe)


def test_sources_are_named_and_the_rest_is_the_default():
    recipe = default_config()
    recipe.data.sources = config_module.sources({"near": {"path": "a.jsonl", "weight": 0.1}, "far": {"path": "b"}})
    assert parse(recipe).data.sources == {
        "near": config_module.TrainSource(path="a.jsonl", weight=0.1), "far": config_module.TrainSource(path="b")
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.b", "a/b", "a-b", "", "2d", "class", 3])
def test_a_source_name_that_no_flag_could_hold_is_named(name):
    with pytest.raises(InputError) as error:
        config_module.sources({name: {"path": "a.jsonl"}})
    assert f"bad name of a source in data.sources\n  found:    {name!r}" in str(error.value)
    values = dataclasses.asdict(Config())
    values["data"]["sources"] = {name: values["data"]["sources"]["main"]}
    with pytest.raises(InputError, match="bad name of a source"):
        config_module.from_dict(values)


def test_a_source_that_is_only_a_path_is_named():
    with pytest.raises(InputError, match=r"bad value of data\.sources\.x\n  found:    'a\.jsonl' of type str"):
        config_module.sources({"x": "a.jsonl"})


@pytest.mark.parametrize(
    ("path", "listed", "nearest"),
    [
        ("a.b.ro", "['a.b.cow', 'a.b.row']", "a.b.row"),
        ("a.d.row", "['a.b', 'a.x']", "a.b.row"),
        ("cow", "['a', 'e']", "a.b.cow"),
        ("a.b.row.z", "['a.b.cow', 'a.b.row']", "a.b.row"),
        ("a.b", "['a.b.cow', 'a.b.row']", "a.b.row"),
    ],
)
def test_an_unknown_field_lists_the_nearest_section_only(path, listed, nearest):
    text = str(config_errors.unknown_key(path, ["a.b.row", "a.b.cow", "a.x", "e"]))
    assert f"expected: one of {listed}\n" in text
    assert f"did you mean {nearest!r}?" in text
    assert ("found:    a section" in text) == (path == "a.b")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "arrow", "questions": 2}, "need coordinates[\\s\\S]*arrow, questions=2[\\s\\S]*mode=text_norm"),
        ({"mode": "text_norm", "questions": 2}, "loss_on=official has no meaning[\\s\\S]*layout=conversation"),
    ],
)
def test_fields_that_do_not_go_together(changes, says):
    recipe = default_config()
    recipe.train.loss_on = "official"
    recipe.data.reference.update(changes)
    with pytest.raises(InputError, match=says):
        parse(recipe)


def test_every_table_entry_names_a_field():
    leaves = config_module.flatten(Config()).keys()
    sections = {path.partition(".")[0] for path in leaves}
    sections |= {path.rpartition(".")[0] for path in leaves} | {"data.sources"}
    leaves = {path.replace("data.sources.main.", "data.sources.*.") for path in leaves} | leaves
    groups = {f"optim.groups.*.{field.name}" for field in dataclasses.fields(config_module.Group)}
    sets = {f"eval.sets.*.{field.name}" for field in dataclasses.fields(config_module.EvalSet)}
    assert set(config_rules.RANGES) <= leaves | groups | sets
    assert config_rules.CHOICES.keys() <= leaves | sets
    assert tuple(field.name for field in dataclasses.fields(config_module.Tasks)) == config_rules.TASKS
    assert set(same_run.FREE_TO_CHANGE) <= leaves | sections


def test_saved_config_is_loaded_equal(tmp_path):
    recipe = default_config()
    recipe.model.hf_config = dict(hidden_size=8, vision_config=dict(depth=2, blocks=[1, 3]))
    recipe.data.geometry.crop_width = (11, 13)
    recipe.optim.learning_rate = 1 / 3
    config_module.save(parse(recipe), tmp_path / "config.json")
    assert config_module.load(tmp_path / "config.json") == parse(recipe)


def test_a_config_from_before_a_field_existed_is_loaded(tmp_path):
    values = dataclasses.asdict(dataclasses.replace(Config(), train=config_module.Train(max_steps=7)))
    del values["optim"]["groups"], values["model"]["lora"]["alpha"], values["data"]["reference"]["layout"]
    del values["train"]["digit_weight"], values["eval"]["source"]["split"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert config_module.load(tmp_path / "config.json") == Config(train=config_module.Train(max_steps=7))


def test_loading_is_as_strict_as_parsing(tmp_path):
    values = dataclasses.asdict(Config())
    values["train"]["sead"] = values["train"].pop("seed")
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"did you mean 'train\.seed'"):
        config_module.load(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("mesh.fsdp", 4),
        ("eval.samples", 3),
        ("eval.source.path", "x"),
        ("train.save_steps", 7),
        ("data.max_bad_records", 1),
        ("data.workers", 2),
        ("track.wandb_project", "depth"),
        ("data.mixture.size_exponent", 0.5),
        ("data.sources", {"main": {}, "other": {"weight": 0.1}}),
    ],
)
def test_a_run_may_continue_with_another(path, value):
    same_run.check_same_run(Config(), parse(changed(path, value)), "runs/a")


def test_a_run_may_not_continue_with_another_result_and_each_difference_is_named():
    recipe = changed("optim.learning_rate", 0.5)
    recipe.train.max_steps = 3
    recipe.data.geometry.crop_width = (1, 2)
    recipe.mesh.data = 4
    recipe.model.hf_config = dict(hidden_size=8)
    with pytest.raises(InputError) as error:
        same_run.check_same_run(Config(), parse(recipe), "runs/a")
    text = str(error.value)
    assert text.startswith("runs/a holds a run of another config")
    for difference in (
        "optim.learning_rate: 1e-05 there, 0.5 here",
        "train.max_steps: 1000 there, 3 here",
        "data.geometry.crop_width: [1000, 1400] there, [1, 2] here",
        "model.hf_config.hidden_size: None there, 8 here",
    ):
        assert difference in text
    assert "mesh" not in text and "--workdir" in text


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_is_valid(file):
    spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = parse(module.get_config())
    assert config != Config()


def test_there_are_recipes():
    assert "demo" in [file.stem for file in RECIPES]
