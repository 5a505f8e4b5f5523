import dataclasses
import json
import re
import runpy
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import worlds
import yaml
from huggingface_hub.repocard import metadata_load
from PIL import Image

from configs import demo
from depthlm_jax import config as config_module
from depthlm_jax import config_rules, model_card, release, snippet
from depthlm_jax import run as runs
from depthlm_jax.cli import command
from depthlm_jax.data import camera, pipeline, reference, tasks, transforms
from depthlm_jax.errors import InputError
from depthlm_jax.eval import evaluate
from depthlm_jax.train import loop

GRID_PX = 16
QWEN_3B = "Qwen/Qwen2.5-VL-3B-Instruct"


FAMILIES = {"qwen2_5_vl": {}, "pixtral": worlds.PIXTRAL}  # changes to a recipe


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def workdir(scenes, family, tmp_path_factory):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("run")
    config = worlds.config(scenes, {"train.max_steps": 1} | FAMILIES[family])
    run = runs.open_run(config, folder)
    batches = pipeline.training_batches(pipeline.open_sources(config), run.processor, config)
    loop.run(
        loop.make_trainer(run.network, config, run.mesh), config, folder, batches, lambda: runs.first_parameters(run)
    )
    return folder


@pytest.fixture(scope="module")
def exported(workdir, evaluated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    run = runs.reopen(workdir)
    step = release.export_run(run, folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    generation |= {"do_sample": True, "repetition_penalty": 1.5, "temperature": 0.1}  # as the published folders say
    (folder / "generation_config.json").write_text(json.dumps(generation))
    model_card.write(run, step, folder, "", "apache-2.0", None)
    return folder


PICTURES = (  # width, height, fx, fy, x, y; the focal length wanted is 50 px
    (64, 48, 50.0, 50.0, 20, 31),
    (48, 80, 50.0, 50.0, 40, 7),
    (96, 48, 50.0, 50.0, 77, 20),
    (150, 131, 131.0, 97.0, 90, 40),
    (31, 44, 24.0, 27.5, 17, 33),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A JSONL file of noise, see PICTURES."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)  # every answer's two likeliest tokens are 5e-4 apart or more: no rounding decides
    lines = []
    for number, (width, height, fx, fy, x, y) in enumerate(PICTURES):
        noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        intrinsics = [fx, fy, width / 2 + 1.3, height / 2 - 2.1, width, height]
        lines.append(
            {"image": f"{number}.png", "intrinsics": intrinsics, "pixel_coords": [[x, y]], "depth": [2.0 + number]}
        )
    file = folder / "noise.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def evaluated(workdir, pictures):
    """What `evaluate` says about the pictures; its metrics.json lies in the run's folder."""
    wanted = worlds.config(pictures, {"eval.samples": len(PICTURES), "eval.batch_rows": len(PICTURES)})
    one = dataclasses.replace(wanted, mesh=config_module.Mesh(1, 1, 1))
    run = runs.connect(
        dataclasses.replace(config_module.load(workdir / "config.json"), eval=one.eval, mesh=one.mesh),
        workdir, runs.host_device(), len(PICTURES), "",
    )  # fmt: skip
    step, parameters = runs.trained_parameters(run)
    result = evaluate.evaluate(run, parameters)
    (workdir / "evaluation").mkdir()
    evaluate.save(result, step, run.config.eval, workdir / "evaluation")
    assert len(result.answers) == len(result.shown) == len(PICTURES)
    assert len({answer.text for answer in result.answers}) > 1  # the image matters
    in_order = dataclasses.replace(
        result, answers=sorted(result.answers, key=lambda answer: answer.record_id),
        shown=sorted(result.shown, key=lambda example: example.record_id),
    )  # fmt: skip
    return in_order


def program_of(card: str) -> str:
    (program,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return program


def for_picture(program: str, folder, pictures, number: int) -> str:
    """Returns the snippet as a user changes it for an image."""
    width, height, fx, fy, x, y = PICTURES[number]
    values = {
        "FOLDER": str(folder), "IMAGE": str(pictures.parent / f"{number}.png"),
        "INTRINSICS": (fx, fy, width / 2 + 1.3, height / 2 - 2.1), "PIXEL": (x, y),
    }  # fmt: skip
    return snippet.fill(program, values)


@pytest.fixture(scope="module")
def functions(exported, pictures, tmp_path_factory):
    """The names of the card's snippet."""
    file = tmp_path_factory.mktemp("snippet") / "usage.py"
    file.write_text(for_picture(program_of((exported / "README.md").read_text()), exported, pictures, 0))
    return runpy.run_path(str(file))


@pytest.mark.parametrize("number", range(len(PICTURES)))
def test_the_snippet_sees_what_the_model_was_trained_on(functions, evaluated, pictures, number):
    width, height, fx, fy, x, y = PICTURES[number]
    image = Image.open(pictures.parent / f"{number}.png")
    seen, question = functions["prepare"](image, (fx, fy, width / 2, height / 2), (x, y), GRID_PX)
    (ours,) = evaluated.shown[number].images
    (asked,) = evaluated.shown[number].questions
    assert question == asked.text
    theirs = np.asarray(seen)
    assert theirs.shape == ours.shape
    if (fx, fy) == (50.0, 50.0):
        np.testing.assert_array_equal(theirs, ours)
    else:  # resampled by another library, marked at the same pixels
        ((u, v),) = asked.pixels
        for dx, dy in reference.MARKERS["arrow"]:
            assert theirs[v + dy, u + dx].tolist() == ours[v + dy, u + dx].tolist() == [255, 0, 0]
        difference = np.abs(theirs.astype(int) - ours)
        assert difference.mean() < 10


@pytest.fixture(scope="module")
def loaded(functions):
    return functions["load"]()


@pytest.mark.parametrize("number", [n for n, (_, _, *focal, _, _) in enumerate(PICTURES) if focal == [50.0, 50.0]])
def test_the_snippet_gets_the_answer_that_evaluate_gets(functions, loaded, evaluated, pictures, number):
    width, height, fx, fy, x, y = PICTURES[number]
    image = Image.open(pictures.parent / f"{number}.png")
    seen, question = functions["prepare"](image, (fx, fy, width / 2, height / 2), (x, y), GRID_PX)
    said = functions["ask"](*loaded, seen, question)
    assert said == evaluated.answers[number].text


def test_the_snippet_runs_by_itself(exported, evaluated, pictures, tmp_path):
    number = 1
    program = program_of((exported / "README.md").read_text())
    (tmp_path / "usage.py").write_text(for_picture(program, exported, pictures, number))
    done = subprocess.run(
        [sys.executable, "-I", "usage.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said, metres = done.stdout.removesuffix("\n").rsplit("\n", 1)
    assert said == evaluated.answers[number].text and metres.endswith(" m")


@pytest.mark.parametrize(
    ("answer", "metres"),
    [
        (tasks.answer_text(2.35), 2.35),
        ("<answer> 1.00 </answer> no, <answer>12</answer>", 12.0),
        ("<answer> 2.35", None),
        ("2.35", None),
        ("<answer> two </answer>", None),
    ],
)
def test_the_snippet_reads_answers(functions, answer, metres):
    assert functions["parse"](answer) == metres == tasks.parse_answer(answer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_needs_nothing_of_this_package(name):
    source = (snippet.FAMILIES / name / "usage.py").read_text()
    found = set(re.findall(r"^(?:import|from) (\w+)", source, flags=re.MULTILINE))
    assert found <= {"inspect", "json", "re", "pathlib", "numpy", "torch", "PIL", "transformers"}
    assert "depthlm_jax" not in source


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("hint", ["none", "intrinsics"])
@pytest.mark.parametrize("mode", [*config_rules.MARKERS, *config_rules.TEXT_MODES])
def test_every_way_to_point_is_the_same_in_the_snippet(tmp_path, name, mode, hint):
    rng = np.random.default_rng()
    scale = int(rng.integers(1, 4))
    data = config_module.Data(
        geometry=config_module.Geometry(focal_px=float(rng.uniform(90, 400))),
        reference=config_module.Reference(mode=mode, scale=scale, color="blue"), camera_hint=hint,
    )  # fmt: skip
    config = config_module.Config(model=config_module.Model(family=name), data=data)
    (tmp_path / "usage.py").write_text(snippet.program(config, "."))
    prepare = runpy.run_path(str(tmp_path / "usage.py"))["prepare"]
    for _ in range(10):
        width, height = rng.integers(120, 300, 2).tolist()
        source = camera.Camera(*rng.uniform(100, 300, 2), width * 0.5, height * 0.4, width, height)
        view = camera.plan_view(source, data.geometry, GRID_PX, None)
        point = rng.integers((0, 0), (width, height))
        pixels, _ = camera.project_points(view, [point])
        if not reference.fits(mode, scale, view.camera.width, view.camera.height, pixels)[0]:
            continue
        image = Image.new("RGB", (width, height), "white")
        intrinsics = source.fx, source.fy, source.cx, source.cy
        seen, question = prepare(image, intrinsics, tuple(point.tolist()), GRID_PX)
        blank = np.full((view.camera.height, view.camera.width, 3), 255, np.uint8)
        np.testing.assert_array_equal(np.asarray(seen), reference.draw(blank, pixels, mode, scale, "blue"))
        look = transforms.Look(
            "", blank, view.camera, pixels, np.ones(1, bool), np.ones(1), np.ones(1), np.ones((1, 3)), None
        )
        ours = transforms.example([look], "distance", [[0]], data, None, [0.5])  # limits are for official geometry
        assert question == ours.questions[0].text


def test_official_geometry_of_the_snippet(tmp_path):
    geometry = config_module.Geometry(mode="official", focal_px=750.0)
    config = config_module.Config(data=config_module.Data(geometry=geometry))
    (tmp_path / "usage.py").write_text(snippet.program(config, "."))
    prepare = runpy.run_path(str(tmp_path / "usage.py"))["prepare"]
    seen, _ = prepare(Image.new("RGB", (640, 480)), (559.62, 558.14, 361.87, 241.99), (618, 74), 28)
    red = np.argwhere(np.asarray(seen)[..., 0] == 255)
    assert seen.size == (857, 643)
    assert red.max(axis=0).tolist() == [99 + 2, 828 - 1]  # METHOD: the release's example, pixel (828, 99)


def test_front_matter_is_what_the_hub_reads(exported, evaluated):
    values = metadata_load(exported / "README.md")
    card = huggingface_hub.ModelCard.load(exported / "README.md")
    assert card.data.to_dict() == values
    assert values["pipeline_tag"] == "image-text-to-text" and values["library_name"] == "transformers"
    assert values["license"] == "apache-2.0" and "base_model" not in values and "base_model_relation" not in values
    assert all(re.fullmatch(r"[\w./-]+", name) for name in values["datasets"])
    (index,) = values["model-index"]
    (result,) = index["results"]
    assert result["task"]["type"] == "depth-estimation"
    measured = {metric["type"]: metric["value"] for metric in result["metrics"]}
    expected = {name: value for name, value in evaluated.scores()["model"].items() if value is not None and name != "n"}
    assert measured == expected and "delta1" in measured


def test_the_card_tells_how_to_ask(exported):
    card = (exported / "README.md").read_text()
    for words in (tasks.QUESTION, "focal length of 50 px", "multiple of 16 px", "(-5, 0)", "rgb(255, 0, 0)",
                  "principal axis (z-depth)", "<answer> 2.35 </answer>", "1 of 1", "random weights"):  # fmt: skip
        assert words in card, words
    assert str(exported) not in card and "/tmp" not in card


def facts(changes: dict, **fields) -> model_card.Facts:
    recipe = demo.get_config()
    recipe.model.random_weights = False
    recipe.data.sources = config_module.sources(
        {"streets": {"path": "/disk7/streets.jsonl", "weight": 2.0}, "rooms": {"path": "/disk7/rooms/1.0.0"},
         "off": {"path": "/disk7/off.jsonl", "weight": 0.0}}
    )  # fmt: skip
    for path, value in changes.items():
        recipe.update_from_flattened_dict({path: value})
    return model_card.Facts(config_module.parse(recipe), 600, 28, **fields)


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("base", sorted(model_card.PUBLISHED))
def test_a_published_base_is_known_by_the_name_of_its_folder(base, tmp_path, capsys):
    organisation, name = base.split("/")
    cached = f"models--{organisation}--{name}/snapshots/0123abc"
    for folder in (name, f"{name}/", cached):
        model = config_module.Model(hf_dir=f"{tmp_path}/{folder}")
        assert model_card.base_of(model, "") == base
    assert capsys.readouterr().out == ""
    card = model_card.text(facts({"model.hf_dir": name}, base_model=base, license=model_card.PUBLISHED[base]))
    values = front_matter(card)
    assert (values["base_model"], values["base_model_relation"]) == (base, "finetune")
    assert values["license"] == "apache-2.0" or {"license_name", "license_link"} <= values.keys()
    assert values["datasets"] == ["rooms", "streets"]
    assert "disk7" not in card and "rooms: 1, streets: 2" in card and "Not evaluated." in card


def test_an_unknown_base_is_left_out_with_a_warning(capsys):
    model = config_module.Model(hf_dir="somewhere/my-finetune")
    assert model_card.base_of(model, "") is None
    assert "no base model: none is called 'my-finetune'; give --base_model" in capsys.readouterr().out
    assert model_card.base_of(model, "me/mine") == "me/mine"
    values = front_matter(model_card.text(facts({"model.hf_dir": "x"})))
    assert not {"base_model", "license", "base_model_relation", "model-index"} & values.keys()


@pytest.mark.parametrize("given", ["mine", "me/mine/too", "me/mi ne", "/mine"])
def test_a_base_model_that_is_no_hub_id_is_refused(given):
    with pytest.raises(InputError, match="--base_model: not a name on the hub") as error:
        model_card.base_of(config_module.Model(hf_dir="x"), given)
    assert "USER/NAME" in str(error.value)


def test_random_weights_have_no_base():
    assert model_card.base_of(config_module.Model(random_weights=True), "") is None
    with pytest.raises(InputError, match="this run has none"):
        model_card.base_of(config_module.Model(random_weights=True), QWEN_3B)


def test_a_licence_is_spelled_as_on_the_hub(workdir, tmp_path, capsys):
    run = runs.reopen(workdir)
    with pytest.raises(InputError, match="--license: not a licence as the hub spells it"):
        model_card.write(run, 1, tmp_path, "", "Apache 2.0", None)
    assert list(tmp_path.iterdir()) == []
    model_card.write(run, 1, tmp_path, "", "", None)
    assert "the card names no licence; give --license=IDENTIFIER" in capsys.readouterr().out
    assert "license" not in metadata_load(tmp_path / "README.md")


def test_scores_of_another_step_are_not_shown(workdir, evaluated, tmp_path, capsys):
    run = runs.reopen(workdir)
    model_card.write(run, 7, tmp_path, "", "mit", None)
    assert "has scores of step 1, this is step 7; run evaluate again" in capsys.readouterr().out
    assert "Not evaluated." in (tmp_path / "README.md").read_text()
    with pytest.raises(InputError, match="not the scores of what is exported") as error:
        model_card.write(run, 7, tmp_path, "", "mit", workdir / "evaluation/metrics.json")
    assert "scores of step 7" in str(error.value)
    with pytest.raises(InputError, match="missing.json: cannot be read"):
        model_card.write(run, 7, tmp_path, "", "mit", tmp_path / "missing.json")


def test_scores_name_their_own_set(workdir, evaluated):
    scores = json.loads((workdir / "evaluation/metrics.json").read_text())
    settings = dataclasses.asdict(config_module.Eval(config_module.Source("/disk7/nyuv2/1.0.0", split="test")))
    values = front_matter(model_card.text(facts({}, scores=scores | {"eval": settings}, hub_id="me/mine")))
    (index,) = values["model-index"]
    assert index["name"] == "mine"
    assert index["results"][0]["dataset"] == {"name": "nyuv2", "type": "nyuv2", "split": "test"}
    nowhere = scores | {"eval": dataclasses.asdict(config_module.Eval())}
    card = model_card.text(facts({"eval.source.path": ""}, scores=nowhere))
    assert "model-index" not in front_matter(card) and "A set without a name" in card


def test_every_trained_task_is_told_and_only_a_distance_is_asked_by_the_snippet():
    weights = {"data.tasks.distance": 0.0, "data.tasks.two_points": 1.0, "data.tasks.speed": 2.0,
               "data.tasks.translation": 1.0, "data.reference.mode": "text_norm"}  # fmt: skip
    card = model_card.text(facts(weights))
    assert "## Usage" not in card and "({nx}, {ny}) and ({nx2}, {ny2})" in card
    assert "many meters has the camera moved" in card and "reach the point at coordinates ({nx}, {ny})" in card
    card = model_card.text(facts(weights | {"data.tasks.axis_distance": 1.0}))
    names = {}
    exec(program_of(card).partition("def prepare")[0], names)
    assert "in the forward backward direction? The coordinates" in names["QUESTION"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.label_kind": "ray"}, "Euclidean"),
        ({"data.camera_hint": "ray"}, "the answer begins with the viewing ray"),
        ({"data.camera_hint": "intrinsics"}, "fx = {fx:.1f}"),
        ({"data.geometry.mode": "official"}, "by the factor of fx"),
        ({"data.geometry.focal_px": 0.0}, "to no other focal length"),
        ({"data.reference.mode": "text_raw"}, "(width = {width}, height = {height})"),
        ({"data.reference.mode": "text_norm", "data.reference.questions": 4}, "| questions an image | 4 |"),
        ({"data.mixture.size_exponent": 0.5}, "× records^0.5"),
    ],
)
def test_what_a_run_did_otherwise_is_told(changes, words):
    card = model_card.text(facts(changes))
    assert words in card
    compile(program_of(card), "usage.py", "exec")


def test_tables_of_the_card_have_rows_of_one_length():
    card = model_card.text(facts({"data.reference.mode": "square"}))
    for table in re.findall(r"(?:^\|.*\n)+", card, flags=re.MULTILINE):
        lengths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(lengths) == 1, table


def test_fill_replaces_constants_and_names_one_that_is_not_there():
    source = 'A = (\n    "x"\n    "y"\n)\nB = 2\n\n\ndef f():\n    A = 5\n    return A + B\n'
    assert snippet.fill(source, {"A": "q" * 150, "B": (1, 2)}).splitlines()[-3:] == source.splitlines()[-3:]
    names = {}
    exec(snippet.fill(source, {"A": "wörter " * 30, "B": ((1, 2),) * 40}), names)
    assert (names["A"], names["B"]) == ("wörter " * 30, ((1, 2),) * 40)
    with pytest.raises(KeyError, match="C"):
        snippet.fill(source, {"C": 1})


def test_export_writes_the_card(workdir, evaluated, tmp_path, capsys):
    arguments = [f"--workdir={workdir}", f"--output={tmp_path}/hf", "--license=mit", "--json"]
    assert command.run("export", "…", arguments) == 0
    assert metadata_load(tmp_path / "hf/README.md")["license"] == "mit"
    assert "README.md" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--hf_dir=x", "--license=mit"], "--license is for the model card"),
        (["--hf_dir=x", "--evaluation=m.json"], "--evaluation is for the model card"),
        (["--workdir=x", "--private"], "--private is for --push_to_hub"),
        (["--workdir=x", "--hf_dir=y"], "give either --workdir or --hf_dir"),
    ],
)
def test_flags_that_have_no_effect_are_wrong_usage(flags, says, tmp_path, capsys):
    assert command.run("export", "…", [*flags, f"--output={tmp_path}/hf"]) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
