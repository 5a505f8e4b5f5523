"""Record → view → question: the pure functions of camera, reference and tasks in the order that the method needs."""

import dataclasses

import numpy as np

from depthlm_jax import config
from depthlm_jax.data import camera, reference, tasks
from depthlm_jax.data.records import MAX_IMAGE_PIXELS, DepthRecord, decode_image


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the model's image processor demands of an image."""

    grid_px: int  # sides are multiples of it
    min_pixels: int
    max_pixels: int


@dataclasses.dataclass(frozen=True)
class Look:
    """An image at its final focal length, and its labelled points there."""

    record_id: str
    image: np.ndarray  # (H, W, 3) uint8
    pixels: np.ndarray  # (N, 2) int x, y in the image
    usable: np.ndarray  # (N,) bool: inside, and the marker fits
    depth_m: np.ndarray  # (N,) of the kind that the answer is to say


@dataclasses.dataclass(frozen=True)
class Example:
    """One question about one pixel."""

    record_id: str
    image: np.ndarray  # (H, W, 3) uint8, marker drawn, sides multiples of the grid
    pixel: tuple[int, int]  # x, y of the query in the image that the marker was drawn on
    question: str
    answer: str
    truth_m: float


def look(record: DepthRecord, data: config.Data, limits: Limits, rng: np.random.Generator | None) -> Look:
    """Returns the record's image under the geometry of the config.

    Args:
      record: as stored.
      data: geometry, label kind and marker size.
      limits: of the model.
      rng: draws the crop; None: no crop, as in evaluation.

    Raises:
      InputError: the image cannot be decoded, is of another size than declared, or leaves the model's limits.
    """
    image = decode_image(record)
    source = camera.Camera(*record.intrinsics, width=image.shape[1], height=image.shape[0])
    view = camera.plan_view(source, data.geometry, limits.grid_px, rng)
    if data.geometry.mode == "corrected":
        camera.check_pixels(view, limits.min_pixels, limits.max_pixels)
    else:  # the second resize keeps the model's limits by itself, but needs an image
        camera.check_pixels(view, 1, MAX_IMAGE_PIXELS)
    pixels, inside = camera.project_points(view, record.pixel_coords)
    fits = reference.arrow_fits(view.camera.width, view.camera.height, pixels, data.marker_scale)
    kind = record.depth_kind if data.label_kind == "record" else data.label_kind
    depth_m = camera.convert_depth(source, record.pixel_coords, record.depth_m, record.depth_kind, kind)
    return Look(record.record_id, camera.apply_view(view, image), pixels, inside & fits, depth_m)


def ask(seen: Look, point: int, data: config.Data, limits: Limits) -> Example:
    """Returns the question about one of the look's points."""
    x, y = (int(v) for v in seen.pixels[point])
    image = reference.draw_arrow(seen.image, x, y, data.marker_scale)
    if data.geometry.mode == "official":
        image = camera.snap_to_grid(image, limits.grid_px, limits.min_pixels, limits.max_pixels)
    depth_m = float(seen.depth_m[point])
    return Example(seen.record_id, image, (x, y), tasks.QUESTION, tasks.answer_text(depth_m), depth_m)
