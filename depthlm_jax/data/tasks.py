"""The words: question and answer of each task, and how an answer is read.

A question is: opening, the task's own question about a place, a note, the closing. `ask` puts them together; places and
notes come from `reference`. What the model is trained to say is the task's thinking and one number.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from depthlm_jax.errors import InputError

SYSTEM = "You are a helpful assistant."
CLOSING = (
    "Output the thinking process in <think> </think> and final answer (the {number} only, without the unit) in "
    "<answer> </answer> tags."
)
CAMERA = "focal length fx = {:.1f}, fy = {:.1f} and principal point cx = {:.1f}, cy = {:.1f} in pixels"
TAKEN = ("", " taken with {}", ", the first taken with {}, the second with {}")  # by the number of cameras
RAY = "({:z.2f}, {:z.2f}, {:z.2f})"  # z: what rounds to zero has no sign
RAYS = (  # by the number of points
    "",
    "The viewing ray of the point is {}. ",
    "The viewing rays of the 2 points are {} and {}. ",
)
LONGEST_M, LONGEST_RAY = 99999.99, (-0.99, -0.99, -0.99)
NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
ANSWER = re.compile(rf"<answer>\s*({NUMBER})\s*</answer>")
LAST_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")

Ray = tuple[float, float, float]  # unit viewing direction: x right, y down, z forward


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known about what is asked for; a length that the task does not ask for may be missing."""

    place: str = ""  # what its points are called, one phrase for one or two; see `reference.place`
    distance_m: float = math.nan  # of the first point, of the label kind of the config
    axis_m: float = math.nan  # z of the first point
    apart_m: float = math.nan  # between the two points
    moved_m: float = math.nan  # between the two cameras
    rays: tuple[Ray, ...] = ()  # one a point, in the order of the place
    chance: float  # in [0, 1): draws the number that `speed` and `time` give


@dataclass(frozen=True)
class Asked:
    question: str
    answer: str
    truth: float  # not rounded, in the task's unit


@dataclass(frozen=True)
class Task:
    """A measured length, or that length divided by the number that the question gives."""

    points: int
    images: int
    number: str  # what the answer is to be, in the words of the closing
    question: str
    think: str
    metres: Callable[[Facts], float]  # the length that is measured
    given: tuple[float, float] = (1.0, 1.0)  # range of the number that the question gives
    may_be_zero: bool = False


# The seconds and speeds of the paper are not published: the ranges are ours. They are drawn log-uniformly and do not
# depend on the distance, which they would give away; a point at half a metre still gets an answer of 0.05.
TASKS = {
    "distance": Task(
        1, 1, "meter number", "how far is {place} from the camera?",
        "The point is around {metres:.2f} meters away from the camera.", lambda facts: facts.distance_m,
    ),
    "axis_distance": Task(
        1, 1, "meter number", "how far is {place} from the camera in the forward backward direction?",
        "The point is around {metres:.2f} meters away from the camera in the forward backward direction.",
        lambda facts: facts.axis_m,
    ),
    "speed": Task(
        1, 1, "meter per second number",
        "how many meters per second should we move in order to reach {place} in exactly {given:.1f} seconds?",
        "The point is around {metres:.2f} meters away. Hence, the speed should be around "
        "{metres:.2f} / {given:.1f} = {answer:.2f}m/s", lambda facts: facts.distance_m, given=(1.0, 10.0),
    ),
    "time": Task(
        1, 1, "number of seconds",
        "how many seconds do we need to reach {place} if we move towards it with the speed of {given:.1f}m/s?",
        "The point is around {metres:.2f} meters away. Hence, we need around "
        "{metres:.2f} / {given:.1f} = {answer:.2f}s", lambda facts: facts.distance_m, given=(0.5, 10.0),
    ),
    "two_points": Task(
        2, 1, "meter number", "how far are {place} from each other?",
        "The 2 points are around {metres:.2f} meters away from each other.", lambda facts: facts.apart_m,
    ),
    "translation": Task(
        0, 2, "meter number", "how many meters has the camera moved between them?",
        "The camera has moved around {metres:.2f} meters between the 2 images.", lambda facts: facts.moved_m,
        may_be_zero=True,
    ),
}  # fmt: skip


def opening(images: int, size: tuple[int, int] | None, intrinsics: Sequence[float] | None) -> str:
    """Returns how a question begins.

    Args:
      images: that the question is about, 1 or 2.
      size: (width, height) in px if it is told, as `text_raw` places need.
      intrinsics: if they are told, fx, fy, cx, cy in px of the model's image; eight numbers for two cameras.

    >>> opening(1, None, None), opening(2, None, None)
    ('Given this image,', 'Given these 2 images,')
    >>> opening(1, (1148, 868), None)
    'Given this image of size (width = 1148, height = 868),'
    >>> opening(1, None, (1000, 1000, 573.21, 433.07))  # doctest: +NORMALIZE_WHITESPACE
    'Given this image taken with focal length fx = 1000.0, fy = 1000.0 and principal point cx = 573.2, cy = 433.1
    in pixels,'

    Source: the size as in DepthLM's text baseline; the paper's words for the intrinsics are not published.
    """
    shown = "this image" if images == 1 else f"these {images} images"
    told = "" if size is None else " of size (width = {}, height = {})".format(*size)
    numbers = intrinsics or ()
    cameras = [CAMERA.format(*numbers[start : start + 4]) for start in range(0, len(numbers), 4)]
    return f"Given {shown}{told}{TAKEN[len(cameras)].format(*cameras)},"


def ask(task: str, facts: Facts, opening: str, note: str, ray_first: bool) -> Asked:
    """Returns question, answer and truth of a task.

    The numbers that are shown fit each other: the answer is computed from the rounded distance. The truth is not.
    An answer below 0.005 is shown as 0.00, which `parse_answer` takes for a failure, except of a translation.

    >>> facts = Facts(place="the pixel at (5, 7)", distance_m=7.2349, chance=0.6, rays=((0.1234, -0.051, 0.991),))
    >>> asked = ask("speed", facts, "Given this image,", "", ray_first=False)
    >>> asked.question.partition(" Output")[0]  # doctest: +NORMALIZE_WHITESPACE
    'Given this image, how many meters per second should we move in order to reach the pixel at (5, 7)
    in exactly 4.0 seconds?'
    >>> asked.answer.partition(" Hence, ")[2], asked.truth
    ('the speed should be around 7.23 / 4.0 = 1.81m/s </think>\\n\\n<answer> 1.81 </answer>', 1.808725)
    >>> ask("distance", facts, "Given this image,", "", ray_first=True).answer.partition(" </think>")[0]
    '<think> The viewing ray of the point is (0.12, -0.05, 0.99). The point is around 7.23 meters away from the camera.'

    Args:
      task: of `TASKS`.
      facts: what is known; the task's own length must be there.
      opening: how the question begins; see the function of this name.
      note: a sentence that explains the place, or ''; left out where no point is asked about.
      ray_first: the answer begins with the viewing ray of each point, if there is a point.

    Raises:
      InputError: the length is not known, or too long for an answer.

    Source: DepthLM's prompt; for the five other tasks the wording of its multi-task extension in the same frame.
    """
    row = TASKS[task]
    truth_m = float(row.metres(facts))
    if not 0 <= truth_m <= LONGEST_M:
        raise InputError(
            f"task {task}: this length cannot be an answer", found=f"{truth_m} m", expected=f"0 to {LONGEST_M} m",
            fix="correct the record's depth and pose, which are in metres",
        )  # fmt: skip
    given, rays = _draw_given(row, facts.chance), facts.rays if ray_first else None
    question = _question(row, facts.place, opening, note, given)
    metres = round(truth_m, 2)
    return Asked(question, _answer(row, rays, metres, given, metres / given), truth_m / given)


def widest(task: str, place: str, opening: str, note: str, ray_first: bool) -> Asked:
    """Returns the longest texts that `ask` gives for a place and an opening, number by number; the truth is nan."""
    row = TASKS[task]
    smallest, largest = row.given
    rays = (LONGEST_RAY,) * row.points if ray_first else None
    question = _question(row, place, opening, note, largest)
    return Asked(question, _answer(row, rays, LONGEST_M, largest, LONGEST_M / smallest), math.nan)


def answer_text(depth_m: float) -> str:
    """Returns what the model is trained to say of a distance: two decimals, think part and answer part."""
    return _answer(TASKS["distance"], None, depth_m, 1.0, depth_m)


def parse_answer(text: str, task: str = "distance") -> float | None:
    """Returns the number of an answer: the one that fills the last <answer> tag which holds just a number.

    None is a failure: no such tag, an unfinished one, or a number that is not finite and positive. A translation may
    be 0.
    """
    numbers = ANSWER.findall(text)
    return parse_number(numbers[-1] if numbers else "", task)


def beginnings(task: str, *, ray_first: bool) -> list[str]:
    """Returns the texts that an answer may begin with such that its number follows at once.

    >>> beginnings("distance", ray_first=False), beginnings("speed", ray_first=False)
    (['<think> The point is around ', '<answer> '], ['<answer> '])
    """
    row = TASKS[task]
    thinks = [] if ray_first or row.given != (1.0, 1.0) else [f"<think> {row.think.split('{')[0]}"]
    return [*thinks, "<answer> "]


def parse_number(text: str, task: str = "distance") -> float | None:
    """Returns the number that the whole text is, None where `parse_answer` would say it of an answer."""
    value = float(text) if re.fullmatch(NUMBER, text) else math.nan
    return value if 0 < value < math.inf or (value == 0 and TASKS[task].may_be_zero) else None


def official_parse(text: str) -> float:
    """Returns the last number anywhere in the text, negative ones too, 0 if there is none; for parity only.

    Source: the evaluation of the release.
    """
    numbers = LAST_NUMBER.findall(text)
    return float(numbers[-1]) if numbers else 0.0


def _draw_given(row: Task, chance: float) -> float:
    smallest, largest = row.given
    return round(smallest * (largest / smallest) ** chance, 1)


def _question(row: Task, place: str, opening: str, note: str, given: float) -> str:
    own, closing = row.question.format(place=place, given=given), CLOSING.format(number=row.number)
    return " ".join(part for part in (opening, own, note if row.points else "", closing) if part)


def _answer(row: Task, rays: Sequence[Ray] | None, metres: float, given: float, answer: float) -> str:
    told = RAYS[0 if rays is None else row.points].format(*(RAY.format(*ray) for ray in rays or ()))
    think = row.think.format(metres=metres, given=given, answer=answer)
    return f"<think> {told}{think} </think>\n\n<answer> {answer:.2f} </answer>"


# What the release asks.
QUESTION = _question(TASKS["distance"], "the point pointed by the red arrow", opening(1, None, None), "", 1.0)
