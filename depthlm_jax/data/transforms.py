"""Record → view → questions: the pure functions of camera, reference and tasks in the order that the method needs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from depthlm_jax import config
from depthlm_jax.data import camera, images, reference, tasks
from depthlm_jax.data.depth_record import DepthRecord
from depthlm_jax.errors import InputError

WIDEST_PX = 88888  # no coordinate or focal length has more digits


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the model's image processor demands of an image."""

    grid_px: int  # sides are multiples of it
    min_pixels: int
    max_pixels: int
    longest_px: int  # no side may be longer; 0: any


@dataclasses.dataclass(frozen=True)
class Look:
    """An image at its final focal length, and its labelled points there."""

    record_id: str
    image: np.ndarray  # (H, W, 3) uint8
    camera: camera.Camera  # of the image
    pixels: np.ndarray  # (N, 2) int x, y in the image
    usable: np.ndarray  # (N,) bool: inside, and the marker fits
    label_m: np.ndarray  # (N,) distance of the kind that is meant
    axis_m: np.ndarray  # (N,) along the principal axis
    points_m: np.ndarray  # (N, 3) in the camera's frame
    centre_m: np.ndarray | None  # (3,) of the camera in the world; None: the record has no pose


@dataclasses.dataclass(frozen=True)
class Question:
    """One question and its answer."""

    task: str
    pixels: tuple[tuple[int, int], ...]  # x, y of each point in the image that markers are drawn on
    text: str
    answer: str
    truth: float  # in the unit of the task, not rounded


@dataclasses.dataclass(frozen=True)
class Example:
    """What is asked about a record."""

    record_id: str
    images: tuple[np.ndarray, ...]  # (H, W, 3) uint8, markers drawn, sides multiples of the grid
    questions: tuple[Question, ...]


def look(
    record: DepthRecord, data: config.Data, limits: Limits, chance: camera.Chance | None = None,
    aspect_jitter: tuple[float, float] = (1.0, 1.0),
) -> Look:  # fmt: skip
    """Returns the record's image under the geometry of the config.

    Args:
      record: as stored.
      data: geometry, reference and label kind.
      limits: of the model.
      chance: decides crop, flip and jitter; None: none of them, as in evaluation.
      aspect_jitter: of the source.

    Raises:
      InputError: the image cannot be decoded, is of another size than declared, or leaves the model's limits.
    """
    opened = images.open_image(record)
    source = camera.Camera(*record.intrinsics.tolist(), *opened.size)
    view = camera.plan_view(source, data.geometry, limits.grid_px, chance, aspect_jitter)
    _check_view(record.record_id, view, data.geometry, limits)
    pixels, inside = camera.project_points(view, record.pixel_coords)
    fits = reference.fits(data.reference.mode, data.reference.scale, view.camera.width, view.camera.height, pixels)
    given = source, record.pixel_coords, record.depth_m, record.depth_kind
    axis_m = camera.convert_depth(*given, "z")
    return Look(
        record.record_id, images.render(opened, view), view.camera, pixels, inside & fits,
        label_m=camera.label_depth(record.dataset, *given, data.label_kind), axis_m=axis_m,
        points_m=camera.points_in_camera(source, record.pixel_coords, axis_m),
        centre_m=None if record.pose is None else record.pose[:3, 3],
    )  # fmt: skip


def _check_view(record_id: str, view: camera.View, geometry: config.Geometry, limits: Limits) -> None:
    """Raises InputError for a view that the model does not take, or of an image that would be resized beyond reason."""
    whole = view.source.width * view.camera.fx / view.source.fx * view.source.height * view.camera.fy / view.source.fy
    if not 1 <= whole <= images.MAX_IMAGE_PIXELS:
        raise InputError(
            f"{record_id}: absurd focal length", found=f"fx={view.source.fx}, fy={view.source.fy} px of an image of "
            f"{view.source.width}x{view.source.height} px", expected=f"a whole image of 1 to {images.MAX_IMAGE_PIXELS} "
            f"px at {view.camera.fx:.6g} px focal length", fix="give intrinsics in px of this image",
        )  # fmt: skip
    # Official images: the second resize keeps the model's limits by itself, but needs an image.
    official = geometry.mode == "official"
    allowed = (1, images.MAX_IMAGE_PIXELS, 0) if official else dataclasses.astuple(limits)[1:]
    try:
        camera.check_pixels(view, *allowed)
    except InputError as error:
        raise error.of(record_id) from None


def questions_of(task: str, data: config.Data) -> int:
    """Returns the questions of one sample."""
    return data.reference.questions if tasks.TASKS[task].images == 1 else 1


def example(
    looks: Sequence[Look], task: str, points: Sequence[Sequence[int]], data: config.Data, limits: Limits,
    chances: Sequence[float],
) -> Example:  # fmt: skip
    """Returns questions about one image, or about two of one scene.

    Args:
      looks: as many as the task has images.
      task: name in tasks.TASKS.
      points: of the first look, for each question as many as the task has points; () for a task without points.
      data: geometry, reference and camera hint.
      limits: of the model.
      chances: in [0, 1), one a question: numbers that a question needs.
    """
    first = looks[0]
    pixels = [tuple((int(x), int(y)) for x, y in first.pixels[list(chosen)]) for chosen in points]
    marked = reference.draw(
        first.image, [pixel for chosen in pixels for pixel in chosen], data.reference.mode, data.reference.scale,
        data.reference.color,
    )  # fmt: skip
    pictures = [marked, *(seen.image for seen in looks[1:])]
    if data.geometry.mode == "official":
        pictures = [camera.snap_to_grid(picture, *dataclasses.astuple(limits)) for picture in pictures]
    opening, note, ray_first = _frame(data, [seen.camera for seen in looks])
    try:
        asked = [
            tasks.ask(task, facts(looks, chosen, data, chance), opening, note, ray_first)
            for chosen, chance in zip(points, chances, strict=True)
        ]
    except InputError as error:  # a length that cannot be an answer
        raise error.of(first.record_id) from None
    questions = tuple(
        Question(task, where, one.question, one.answer, one.truth) for where, one in zip(pixels, asked, strict=True)
    )
    return Example(first.record_id, tuple(pictures), questions)


def facts(looks: Sequence[Look], points: Sequence[int], data: config.Data, chance: float) -> tasks.Facts:
    """Returns what is known about one or two points of the first look, or about the cameras of two looks."""
    first = looks[0]
    if len(looks) == 2:
        return tasks.Facts(moved_m=float(np.linalg.norm(looks[1].centre_m - first.centre_m)), chance=chance)
    pixels, point = first.pixels[list(points)], points[0]
    return tasks.Facts(
        place=reference.place(
            data.reference.mode, data.reference.color, pixels, first.camera.width, first.camera.height
        ),
        distance_m=float(first.label_m[point]),
        axis_m=float(first.axis_m[point]),
        apart_m=float(np.linalg.norm(first.points_m[points[-1]] - first.points_m[point])),
        rays=tuple(tuple(camera.viewing_ray(first.camera, *pixel).tolist()) for pixel in pixels),
        chance=chance,
    )


def widest(task: str, data: config.Data) -> tasks.Asked:
    """Returns the longest question and answer that the config gives for a task."""
    row = tasks.TASKS[task]
    seen = camera.Camera(WIDEST_PX, WIDEST_PX, -WIDEST_PX, -WIDEST_PX, WIDEST_PX, WIDEST_PX)
    pixels = [(WIDEST_PX - 1, WIDEST_PX - 1)] * row.points
    place = reference.place(data.reference.mode, data.reference.color, pixels, WIDEST_PX, WIDEST_PX) if pixels else ""
    return tasks.widest(task, place, *_frame(data, [seen] * row.images))


def _frame(data: config.Data, cameras: Sequence[camera.Camera]) -> tuple[str, str, bool]:
    """Returns what is the same in every question about these images: opening, note, whether rays are said first."""
    with_size = data.reference.mode == "text_raw" and len(cameras) == 1
    size = (cameras[0].width, cameras[0].height) if with_size else None
    told = [number for seen in cameras for number in (seen.fx, seen.fy, seen.cx, seen.cy)]
    opening = tasks.opening(len(cameras), size, told if data.camera_hint == "intrinsics" else None)
    return opening, reference.note(data.reference.mode), data.camera_hint == "ray"
