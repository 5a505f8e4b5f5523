import pytest

from depthlm_jax.data.tasks import QUESTION, SYSTEM, answer_text, official_parse, parse_answer


def test_the_words_of_the_release():
    assert SYSTEM == "You are a helpful assistant."
    assert QUESTION == (
        "Given this image, how far is the point pointed by the red arrow from the camera? Output the thinking process "
        "in <think> </think> and final answer (the meter number only, without the unit) in <answer> </answer> tags."
    )
    assert answer_text(2.3456) == (
        "<think> The point is around 2.35 meters away from the camera. </think>\n\n<answer> 2.35 </answer>"
    )


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
