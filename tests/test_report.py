"""report as a user meets it: the command, its page, what it says of a run that is not whole, and a browser."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import browser
import histories
import numpy as np
import pytest
from PIL import Image

from depthlm_jax import __main__ as program
from depthlm_jax.errors import InputError
from depthlm_jax.overview import chart, history, page
from depthlm_jax.overview.blocks import Text

WIDTHS_PX = 360, 1280
FETCHING = {"src", "href", "srcset", "action", "data", "poster"}  # attributes that name what is loaded


class Reader(html.parser.HTMLParser):
    """Collects texts, and what would be fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.texts, self.fetched, self.labels, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if name in FETCHING]
        self.labels += [value for name, value in attrs if name == "aria-label"]

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def report(*arguments: str) -> int:
    return program.main(["report", *arguments, "--json"])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "full"
    histories.write_run(workdir)
    return workdir


@pytest.fixture(scope="module")
def other(run) -> Path:
    workdir = run.parent / "other"
    histories.write_run(workdir, steps=160, rate=0.03, changes={"optim.learning_rate": 2e-2})
    return workdir


@pytest.fixture(scope="module")
def empty(run) -> Path:
    workdir = run.parent / "empty"
    histories.begin(workdir)
    return workdir


def shown(*workdirs: Path) -> Reader:
    return Reader(page.render([history.read(workdir) for workdir in workdirs]))


def test_command_writes_the_page_into_the_workdir(run, capsys):
    assert report(f"--workdir={run}") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == {"output": str(run / "report.html"), "steps": {str(run): 320}}
    assert Reader((run / "report.html").read_text(encoding="utf-8")).text.startswith("full ")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        ([], 2, "--workdir is needed"),
        (["--workdir={run}", "--workdir={other}"], 2, "--output is needed: a page about several runs"),
        (["--workdir={run}/nowhere"], 1, "nowhere: no run here"),
        (["--workdir={run}", "--output={run}/page.png"], 1, "a name that ends in .html"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, status, says, run, other, capsys):
    assert report(*(argument.format(run=run, other=other) for argument in arguments)) == status
    assert says in capsys.readouterr().err


def test_page_says_all_that_the_workdir_holds(run):
    text = shown(run).text
    for said in (
        "steps 320 of 400", "δ1, rooms", "data 2 × fsdp 4", "TPU v5 lite", "Not at its end", "no checkpoint yet",
        "rooms 3 75.0% 70.0%", "streets 1 25.0% 30.0%", "Loss by source", "Model FLOP utilisation",
        "Evaluation: cars, speed", "truth (m/s)", "By range of the truth, step 320", "10 or more 0.450",
        "best constant", "4 of 200 answers could not be read", "<think> far & away </think>", "The worst answers",
        "Started 2 times", "lost 73.2 s (4%)", "was not finite: 2", "rooms:3 and 14 more",
        "Records that were left out: 1",
        "found: [-1.0] fix: <b>correct</b> & go on", "optim.learning_rate 0.01 1e-05", "2030-01-02 04:00:00 UTC",
        "0123456789+", "jax 0.10.2", "data.reference.mode arrow",
    ):  # fmt: skip
        assert said in text, said


def test_scores_are_those_of_the_last_and_the_best_evaluation(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    lines = [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
    for line in lines:
        line["scores"]["model"]["delta1"] = {80: 0.111, 160: 0.777, 240: 0.333, 320: 0.444}[line["step"]]
    histories.write_lines(workdir / "evaluations.jsonl", lines)
    text = shown(workdir).text
    assert "model, step 320 0.444 " in text and "best of 4, step 160 0.777 " in text
    assert any("model: 0.111 at step 80, 0.444 at step 320, between 0.111 and 0.777." in one for one in
               shown(workdir).labels)  # fmt: skip


def test_points_stand_where_their_numbers_are(run):
    (line,) = re.findall(r'<b>Loss</b>.*?<path d="(M[^"]+)" class="line"', page.render([history.read(run)]), re.DOTALL)
    at = np.array([[float(number) for number in point.split(",")] for point in line[1:].split("L")])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, logs = [record["step"] for record in records], np.log([record["loss"] for record in records])
    assert len(at) == len(records)
    for places, numbers, sign in ((at[:, 0], steps, 1), (at[:, 1], logs, -1)):
        slope, offset = np.polyfit(numbers, places, 1)
        assert np.sign(slope) == sign and np.abs(slope * np.array(numbers) + offset - places).max() < 0.2
    assert at[:, 0].min() >= chart.LEFT and at[:, 1].max() <= chart.HEIGHT - chart.BOTTOM


def test_long_lines_keep_their_peaks_in_few_points():
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321], points[77_777] = (54_321, 9.0), (77_777, -5.0)
    kept = chart.thin(points)
    assert len(kept) <= chart.MOST_POINTS and kept == sorted(kept)
    assert {points[0], points[54_321], points[77_777], points[-1]} <= set(kept)


def test_a_line_of_one_point_and_numbers_that_are_none():
    assert chart.line_chart("x", "y", [chart.Line("", [], 0)]) is None
    drawn = chart.line_chart("x", "y", [chart.Line("", [(3, 0.0)], 0)], log=True, zero=True)
    assert drawn["lines"][0]["marks"][0]["text"] == "step 3: 0" and len(drawn["upward"]) >= 2
    assert not any(map(history.is_number, (None, "1", float("nan"), float("inf"))))


def test_a_run_without_a_step_says_what_is_missing(empty):
    text = shown(empty).text
    for said in ("steps 0 of 400", "No metrics yet", "Evaluations None yet.", "Not known yet: goodput.jsonl",
                 "No step was skipped, no record left out.", "Starts None is recorded."):  # fmt: skip
        assert said in text, said


def test_torn_and_strange_lines_are_named_and_left_out(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    for name in ("metrics.jsonl", "goodput.jsonl", "starts.jsonl", "evaluations.jsonl",
                 "faults/skipped.process-0.jsonl", "bad_records.process-0.jsonl",
                 "evaluation/rooms/predictions.jsonl"):  # fmt: skip
        with (workdir / name).open("a") as file:
            file.write('{"step": 3, "torn')
    with (workdir / "evaluations.jsonl").open("a") as file:
        file.write('\n[1, 2]\n{"step": 5}\n')
    (workdir / "base" / "config.json").write_text("{")
    (workdir / "evaluation" / "rooms" / "best.png").unlink()
    text = shown(workdir).text
    assert "metrics.jsonl:34: torn, as a killed process leaves it; it is left out" in text
    assert "evaluations.jsonl:14: no JSON object" in text and "a line without step or scores is left out" in text
    assert "the size of the model is not known" in text and "The worst answers" in text
    assert "steps 320 of 400" in text and "Evaluation: rooms, distance" in text


def test_each_file_may_be_missing(run, tmp_path):
    for name in ("metrics.jsonl", "goodput.jsonl", "starts.jsonl", "evaluations.jsonl", "evaluation", "base"):
        workdir = tmp_path / name / "run"
        shutil.copytree(run, workdir)
        shutil.rmtree(workdir / name) if (workdir / name).is_dir() else (workdir / name).unlink()
        assert "of 400" in shown(workdir).text


def test_an_evaluation_without_sets_is_shown(empty, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(empty, workdir)
    scores = {"model": {"delta1": 0.612, "n": 3}, "best_constant": {"answer": 2.5, "delta1": 0.2}}
    lines = [{"record_id": "a", "pixels": [[1, 2]], "truth": 2.0, "text": "2.1", "answer": 2.1}]
    histories.write_lines(workdir / "evaluation/predictions.jsonl", lines)
    (workdir / "evaluation/metrics.json").write_text(json.dumps({"step": 7, "eval": {"task": "time"}} | scores))
    text = shown(workdir).text
    assert "Evaluation: evaluation, time" in text and "model, step 7 0.612" in text and "best constant, 2.50 s" in text


def test_intended_shares_are_those_of_the_mixture(tmp_path):
    histories.begin(tmp_path / "run", {"data.mixture.size_exponent": 0.5})
    assert "what is intended is known from the first checkpoint on" in shown(tmp_path / "run").text


def test_runs_are_compared(run, other):
    found = shown(run, other)
    text = found.text
    assert text.count("2 runs compared") == 2 and "δ1, cars" in text
    assert "optim.learning_rate full 0.01 other 0.02" in text
    assert "full 320 of 400" in text and "other 160 of 400" in text
    losses = [label for label in found.labels if label.startswith("Loss, nats")]
    assert len(losses) == 1 and "full: " in losses[0] and "other: " in losses[0]
    assert "other: " in next(label for label in found.labels if label.startswith("δ1, rooms"))
    assert text.count("Answers: cars") == 1 and text.count("4 of 200 answers could not be read") > 2


def test_many_runs_stand_below_each_other_and_the_first_are_drawn(run, other):
    pair = history.read(run), history.read(other)
    runs = [dataclasses.replace(pair[number % 2], workdir=Path(f"run-{number}")) for number in range(30)]
    text = Reader(page.compare(runs, "all", [Text("the best ones first")])).text
    assert "the best ones first" in text and "The first 24 of 30 runs." in text and "run-24" not in text
    assert "optim.learning_rate run-0 0.01 run-1 0.02 run-2 0.01" in text


READ = """
import sys
from pathlib import Path
from jax._src import xla_bridge
from depthlm_jax.overview import history, page
page.render([history.read(Path(sys.argv[1]))])
assert not xla_bridge._backends, xla_bridge._backends
"""


def test_page_is_made_without_a_device_which_the_run_may_hold(run):
    subprocess.run([sys.executable, "-c", READ, run], check=True)


def test_runs_of_one_name_are_told_apart_and_none_is_an_error(run, tmp_path):
    shutil.copytree(run, tmp_path / "full")
    names = page.name_runs([history.read(run), history.read(tmp_path / "full")])
    assert names == [str(run), str(tmp_path / "full")]
    with pytest.raises(InputError, match="nothing to show"):
        page.render([])


def test_every_chart_has_a_text_and_nothing_is_fetched(run, other, empty):
    for workdirs in ((run,), (run, other), (empty,)):
        found = shown(*workdirs)
        assert all(address.startswith("data:") for address in found.fetched)
        assert not {"script", "iframe", "object", "embed"} & set(found.tags)
        assert len(found.labels) >= found.tags.count("figure") and all(len(label) > 20 for label in found.labels)


# In a browser

PICTURED = {"one": 1, "several": 2, "empty": 0}  # runs with pictures, of each page


@pytest.fixture(scope="module")
def pages(run, other, empty) -> list[Path]:
    written = []
    for name, workdirs in (("one", [run]), ("several", [run, other]), ("empty", [empty])):
        written.append(run.parent / f"{name}.html")
        written[-1].write_text(page.render([history.read(workdir) for workdir in workdirs]), encoding="utf-8")
    return written


def test_no_page_is_wider_than_a_phone_or_a_screen(pages, tmp_path):
    for one in pages:
        measured = browser.measure(one, WIDTHS_PX, tmp_path)
        assert sorted(frame["width"] for frame in measured) == list(WIDTHS_PX)
        assert all(frame["needed"] <= frame["width"] for frame in measured), one
        pictures = [natural for frame in measured for _, natural, _ in frame["images"]]
        assert pictures == [1400] * 3 * len(WIDTHS_PX) * PICTURED[one.stem]


@pytest.mark.parametrize(("scheme", "paper"), [(1, "light"), (0, "dark")])
def test_page_is_seen_light_and_dark_with_its_curves(pages, tmp_path, scheme, paper):
    shot, setting = tmp_path / "page.png", f"--blink-settings=preferredColorScheme={scheme}"
    with browser.served(pages[0].parent) as (address, requests):
        asked = setting, f"--screenshot={shot}", "--window-size=1280,1600"
        browser.chromium(tmp_path, *asked, f"{address}/{pages[0].name}")
    assert requests == [f"/{pages[0].name}"]
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    ink, background = pixels.mean(axis=2), pixels[2, 2].mean()
    assert background > 240 if paper == "light" else background < 40
    assert ((ink < 60) if paper == "light" else (ink > 200)).mean() > 0.002  # words
    blue = (0, 103, 177) if paper == "light" else (98, 181, 240)
    assert (np.abs(pixels - blue).max(axis=-1) < 12).sum() > 500  # curves
