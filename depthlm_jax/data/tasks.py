"""The words: question and answer of the depth task, and how an answer is read."""

import math
import re

SYSTEM = "You are a helpful assistant."
QUESTION = (
    "Given this image, how far is the point pointed by the red arrow from the camera? Output the thinking process in "
    "<think> </think> and final answer (the meter number only, without the unit) in <answer> </answer> tags."
)
NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
ANSWER = re.compile(rf"<answer>\s*({NUMBER})\s*</answer>")
LAST_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")


def answer_text(depth_m: float) -> str:
    """Returns what the model is trained to say: two decimals, think part and answer part."""
    return (
        f"<think> The point is around {depth_m:.2f} meters away from the camera. </think>\n\n"
        f"<answer> {depth_m:.2f} </answer>"
    )


def parse_answer(text: str) -> float | None:
    """Returns the metres of an answer: the number that fills the last <answer> tag which holds just a number.

    None is a failure: no such tag, an unfinished one, or a number that is not finite and positive.
    """
    numbers = ANSWER.findall(text)
    depth_m = float(numbers[-1]) if numbers else math.nan
    return depth_m if 0 < depth_m < math.inf else None


def official_parse(text: str) -> float:
    """Returns the last number anywhere in the text, negative ones too, 0 if there is none; for parity only.

    Source: the evaluation of the release.
    """
    numbers = LAST_NUMBER.findall(text)
    return float(numbers[-1]) if numbers else 0.0
