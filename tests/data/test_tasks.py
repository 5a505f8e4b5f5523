import dataclasses
import doctest
import itertools
import math
import random
import re

import pytest

from depthlm_jax import config_rules
from depthlm_jax.data import tasks
from depthlm_jax.data.reference import note, place
from depthlm_jax.data.tasks import QUESTION, TASKS, Facts, answer_text, ask, official_parse, opening, parse_answer
from depthlm_jax.errors import InputError

MODES = (*config_rules.MARKERS, *config_rules.TEXT_MODES)
WIDTH, HEIGHT = 1148, 868
K = (1000.0, 1000.0, 573.21, 433.07)
METRE_CLOSING = (
    "Output the thinking process in <think> </think> and final answer (the meter number only, without the unit) in "
    "<answer> </answer> tags."
)
POINTS = ((812, 133), (40, 7))
FACTS = Facts(
    place="the point pointed by the red arrow", distance_m=7.2349, axis_m=6.6, apart_m=2.584, moved_m=5.6, chance=0.6,
    rays=((0.1234, -0.051, 0.991),),
)  # fmt: skip
TWO = dataclasses.replace(
    FACTS, place="the 2 points pointed by the red arrows", rays=((0.1234, -0.051, 0.991), (-0.001, 0.5, 0.866))
)


def random_facts(rng, task, mode):
    """Facts from 10 cm, so that the answer never rounds to zero, to the longest length there is."""
    points = [(rng.randrange(WIDTH), rng.randrange(HEIGHT)) for _ in range(TASKS[task].points)]
    lengths = [round(10 ** rng.uniform(-1, math.log10(tasks.LONGEST_M)), rng.randrange(2, 7)) for _ in range(4)]
    rays = tuple((rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0, 1)) for _ in points)
    where = place(mode, "red", points, WIDTH, HEIGHT) if points else ""
    return Facts(
        place=where, distance_m=lengths[0], axis_m=lengths[1], apart_m=lengths[2], moved_m=lengths[3], rays=rays,
        chance=rng.random(),
    )  # fmt: skip


def test_the_words_of_the_release():
    assert tasks.SYSTEM == "You are a helpful assistant."
    assert QUESTION == (
        "Given this image, how far is the point pointed by the red arrow from the camera? Output the thinking process "
        "in <think> </think> and final answer (the meter number only, without the unit) in <answer> </answer> tags."
    )
    assert answer_text(2.3456) == (
        "<think> The point is around 2.35 meters away from the camera. </think>\n\n<answer> 2.35 </answer>"
    )
    asked = ask("distance", FACTS, opening(1, None, None), note("arrow"), ray_first=False)
    assert asked == tasks.Asked(QUESTION, answer_text(7.2349), 7.2349)
    assert FACTS.place == place("arrow", "red", POINTS[:1], WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "mode, size, expected",
    [
        (
            "text_norm",
            None,
            "Given this image, how far is the point at coordinates (1415, 307) from the camera? The coordinates are in "
            "normalised [0, 2000] format relative to image width and height. ",
        ),
        (
            "text_raw",
            (WIDTH, HEIGHT),
            "Given this image of size (width = 1148, height = 868), how far is the pixel at (812, 133) from the "
            "camera? ",
        ),
        ("dot", None, "Given this image, how far is the point marked by the red dot from the camera? "),
    ],
)
def test_distance_question_of_other_modes(mode, size, expected):
    facts = dataclasses.replace(FACTS, place=place(mode, "red", POINTS[:1], WIDTH, HEIGHT))
    asked = ask("distance", facts, opening(1, size, None), note(mode), ray_first=False)
    assert asked.question == expected + METRE_CLOSING
    assert asked.answer == answer_text(7.2349)


SPEED_CLOSING = METRE_CLOSING.replace("meter number", "meter per second number")
TIME_CLOSING = METRE_CLOSING.replace("the meter number", "the number of seconds")
WORKED = {  # task: facts, opening, core question and closing, think part, number
    "distance": (
        FACTS, 1, "how far is the point pointed by the red arrow from the camera? " + METRE_CLOSING,
        "The point is around 7.23 meters away from the camera.", "7.23", 7.2349,
    ),
    "axis_distance": (
        FACTS, 1,
        "how far is the point pointed by the red arrow from the camera in the forward backward direction? "
        + METRE_CLOSING,
        "The point is around 6.60 meters away from the camera in the forward backward direction.", "6.60", 6.6,
    ),
    "speed": (
        FACTS, 1,
        "how many meters per second should we move in order to reach the point pointed by the red arrow in exactly "
        "4.0 seconds? " + SPEED_CLOSING,
        "The point is around 7.23 meters away. Hence, the speed should be around 7.23 / 4.0 = 1.81m/s", "1.81",
        7.2349 / 4,
    ),
    "time": (
        FACTS, 1,
        "how many seconds do we need to reach the point pointed by the red arrow if we move towards it with the speed "
        "of 3.0m/s? " + TIME_CLOSING,
        "The point is around 7.23 meters away. Hence, we need around 7.23 / 3.0 = 2.41s", "2.41", 7.2349 / 3,
    ),
    "two_points": (
        TWO, 1, "how far are the 2 points pointed by the red arrows from each other? " + METRE_CLOSING,
        "The 2 points are around 2.58 meters away from each other.", "2.58", 2.584,
    ),
    "translation": (
        FACTS, 2, "how many meters has the camera moved between them? " + METRE_CLOSING,
        "The camera has moved around 5.60 meters between the 2 images.", "5.60", 5.6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", config_rules.TASKS)
def test_worked_example_of_each_task(task):
    facts, images, question, think, number, truth = WORKED[task]
    assert TASKS[task].images == images
    asked = ask(task, facts, opening(images, None, None), "", ray_first=False)
    assert asked.question == f"{opening(images, None, None)} {question}"
    assert asked.answer == f"<think> {think} </think>\n\n<answer> {number} </answer>"
    assert asked.truth == pytest.approx(truth, rel=1e-12)


def test_tasks_are_those_of_the_config():
    assert tuple(TASKS) == config_rules.TASKS == tuple(WORKED)


@pytest.mark.parametrize(
    "task, facts, rays",
    [
        ("distance", FACTS, "The viewing ray of the point is (0.12, -0.05, 0.99). "),
        ("time", FACTS, "The viewing ray of the point is (0.12, -0.05, 0.99). "),
        ("two_points", TWO, "The viewing rays of the 2 points are (0.12, -0.05, 0.99) and (0.00, 0.50, 0.87). "),
        ("translation", FACTS, ""),
    ],
)
def test_rays_come_first_and_change_nothing_else(task, facts, rays):
    plain, with_rays = (ask(task, facts, "Given", "", ray_first) for ray_first in (False, True))
    assert with_rays.answer == plain.answer.replace("<think> ", f"<think> {rays}")
    assert (with_rays.question, with_rays.truth) == (plain.question, plain.truth)


@pytest.mark.parametrize(
    "given, expected",
    [
        ((1, None, None), "Given this image,"),
        ((2, None, None), "Given these 2 images,"),
        ((1, (640, 480), None), "Given this image of size (width = 640, height = 480),"),
        (
            (1, None, K),
            "Given this image taken with focal length fx = 1000.0, fy = 1000.0 and principal point cx = 573.2, "
            "cy = 433.1 in pixels,",
        ),
        (
            (1, (640, 480), K),
            "Given this image of size (width = 640, height = 480) taken with focal length fx = 1000.0, fy = 1000.0 and "
            "principal point cx = 573.2, cy = 433.1 in pixels,",
        ),
        (
            (2, None, (*K, 999.96, 1000, 0, -12.34)),
            "Given these 2 images, the first taken with focal length fx = 1000.0, fy = 1000.0 and principal point "
            "cx = 573.2, cy = 433.1 in pixels, the second with focal length fx = 1000.0, fy = 1000.0 and principal "
            "point cx = 0.0, cy = -12.3 in pixels,",
        ),
    ],
)
def test_openings(given, expected):
    assert opening(*given) == expected


@pytest.mark.parametrize("task, mode", list(itertools.product(config_rules.TASKS, MODES)))
def test_every_task_in_every_mode_is_read_back(task, mode):
    rng = random.Random(f"{task} {mode}")
    for ray_first in (False, True) * 20:
        facts = random_facts(rng, task, mode)
        asked = ask(task, facts, opening(TASKS[task].images, None, None), note(mode), ray_first)
        smallest, largest = TASKS[task].given
        read = parse_answer(asked.answer, task)
        rounding = 0.00501 * (1 if largest == smallest else 1 + 1 / smallest)  # of the answer, and of the distance
        assert read == pytest.approx(asked.truth, abs=rounding)
        assert facts.place in asked.question
        assert asked.question.count("normalised") == (mode == "text_norm" and task != "translation")
        division = re.search(r"([0-9.]+) / ([0-9.]+) = ([0-9.]+)(?:m/s|s) </think>", asked.answer)
        assert bool(division) == (task in ("speed", "time"))
        if division:
            metres, given, answer = division.groups()
            assert smallest <= float(given) <= largest and f" {given}" in asked.question
            assert answer == f"{float(metres) / float(given):.2f}" == asked.answer.split()[-2]
            assert asked.truth == pytest.approx(facts.distance_m / float(given), rel=1e-12)


@pytest.mark.parametrize("task, ends", [("speed", (1.0, 10.0)), ("time", (0.5, 10.0))])
def test_given_numbers_fill_their_range_log_uniformly(task, ends):
    given = [ask(task, dataclasses.replace(FACTS, distance_m=1.0, chance=i / 1000), "", "", False) for i in range(1000)]
    numbers = [1 / asked.truth for asked in given]
    assert (min(numbers), max(numbers)) == pytest.approx(ends)
    middle = math.sqrt(math.prod(ends))
    assert sum(number < middle for number in numbers) == pytest.approx(500, abs=20)


@pytest.mark.parametrize("length", [math.nan, -0.01, math.inf, 100000.0])
def test_a_length_that_no_answer_holds_is_an_error(length):
    with pytest.raises(InputError, match=rf"task two_points: this length(.|\n)*found: +{length} m\n.*0 to 99999.99 m"):
        ask("two_points", dataclasses.replace(TWO, apart_m=length), "Given", "", False)


def split_numbers(text):
    return re.split(r"-?[0-9]+", text), [len(number) for number in re.findall(r"-?[0-9]+", text)]


@pytest.mark.parametrize("ray_first", [False, True])
@pytest.mark.parametrize("mode", ["arrow", "text_norm"])
@pytest.mark.parametrize("task", config_rules.TASKS)
def test_nothing_is_longer_than_the_widest(task, mode, ray_first):
    begin, last = opening(TASKS[task].images, None, None), [(WIDTH - 1, HEIGHT - 1)] * TASKS[task].points
    bound = tasks.widest(task, place(mode, "red", last, WIDTH, HEIGHT) if last else "", begin, note(mode), ray_first)
    rng, slack = random.Random(0), []
    for _ in range(500):
        asked = ask(task, random_facts(rng, task, mode), begin, note(mode), ray_first)
        for text, longest in ((asked.question, bound.question), (asked.answer, bound.answer)):
            (words, digits), (longest_words, longest_digits) = split_numbers(text), split_numbers(longest)
            assert words == longest_words
            assert all(here <= most for here, most in zip(digits, longest_digits, strict=True))
        slack.append(len(bound.answer) - len(asked.answer))
    assert 0 <= min(slack) <= 4, "a bound that nothing comes near"


def test_examples_in_the_docstrings():
    result = doctest.testmod(tasks)
    assert result.failed == 0 < result.attempted


@pytest.mark.parametrize("depth_m", [0.01, 0.6, 1.682307, 9.995, 22.35, 128.0])
def test_answers_are_read_back_to_two_decimals(depth_m):
    text = answer_text(depth_m)
    assert parse_answer(text) == official_parse(text.removesuffix(" </answer>")) == float(f"{depth_m:.2f}")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<answer>2.35</answer>", 2.35),
        ("<answer>\n 7 </answer>", 7.0),
        ("<answer> .5 </answer>", 0.5),
        ("<answer> 1e1 </answer>", 10.0),
        ("<answer> 1 </answer> no: <answer> 2 </answer> or 3", 2.0),
        ("<think> <answer> </answer> tags </think> <answer> 4.2 </answer>", 4.2),
        ("<answer> 2.35", None),  # cut off: the number may be unfinished
        ("<think> 2.35 meters </think>", None),
        ("2.35", None),
        ("", None),
        ("<answer> </answer>", None),
        ("<answer> two </answer>", None),
        ("<answer> 2.35 m </answer>", None),
        ("<answer> 2.3.5 </answer>", None),
        ("<answer> 1_0 </answer>", None),
        ("<answer> 0.00 </answer>", None),
        ("<answer> -3 </answer>", None),
        ("<answer> nan </answer>", None),
        ("<answer> inf </answer>", None),
        ("<answer> 1e999 </answer>", None),
    ],
)
def test_only_a_positive_number_in_the_tag_is_an_answer(text, expected):
    for task in config_rules.TASKS:
        zero = task == "translation" and text == "<answer> 0.00 </answer>"  # a camera may stand still
        assert parse_answer(text, task) == (0.0 if zero else expected)
    assert parse_answer(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<answer> 2.35 </answer>", 2.35),
        ("<answer> 2.35 </answer> within 5 meters.", 5.0),
        ("around 2.35.", 2.35),
        ("<answer> -3 </answer>", -3.0),
        ("I cannot tell", 0.0),
    ],
)
def test_official_parser_takes_the_last_number(text, expected):
    assert official_parse(text) == expected
