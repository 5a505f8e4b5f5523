"""How a source image becomes the model's image, and where its pixels, focal lengths and depths go.

The pixel convention of the package: an integer (x, y) is the CENTRE of a pixel, x right, y down, (0, 0) at the top
left. A pixel reaches from −0.5 to +0.5, so an image of W×H px covers [−0.5, W−0.5] × [−0.5, H−0.5]. Boxes alone are
given as edges, from 0 to W: edge = x + 0.5. A resize by s therefore maps x to (x + 0.5)·s − 0.5, and cx likewise.

`corrected` geometry lands on the patch grid with one resize of the visible box, and tracks the scales that really
happened. `official` geometry repeats the release: one scale from fx for both axes, truncation, centred crop.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from depthlm_jax.config import Geometry
from depthlm_jax.errors import InputError

RAY_POWER = {("z", "z"): 0, ("ray", "ray"): 0, ("z", "ray"): 1, ("ray", "z"): -1}
MAX_ASPECT = 200  # of Qwen's processor


@dataclass(frozen=True)
class Camera:
    """Pinhole intrinsics and image size, all in px."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int


@dataclass(frozen=True)
class View:
    """One way to look at a source image: `box` of it is resized to `resized`, then cropped from `corner` on."""

    source: Camera
    camera: Camera  # of the result
    box: tuple[float, float, float, float]  # left, top, right, bottom edges in source px, from 0 to W and H
    resized: tuple[int, int]  # width, height
    corner: tuple[int, int]  # left, top of the result in the resized image
    official: bool


def plan_view(camera: Camera, geometry: Geometry, grid: int, rng: np.random.Generator | random.Random | None) -> View:
    """Returns the view of an image under a geometry; pixels are not needed.

    Args:
      camera: of the source image.
      geometry: `focal_px` 0 leaves the scale at 1; `crop_width` or `crop_height` (0, 0) switches the crop off.
      grid: px that the sides of a corrected view are multiples of: patch × merge.
      rng: draws crop height, crop width, then the x and y position if random; None: no crop, as in evaluation.
        With a `random.Random` the official mode draws the release's own numbers.

    Raises:
      InputError: a focal length is not positive and finite.

    Source: DepthLM section 3 (unified focal length). `corrected` differs from the release: each axis has its own
      scale, the principal point follows the half-pixel convention, nothing is truncated.
    """
    if not (0 < camera.fx < math.inf and 0 < camera.fy < math.inf):
        raise InputError(
            "camera: the focal length must be positive", found=f"fx={camera.fx}, fy={camera.fy} px",
            expected="0 < fx, fy < inf", fix="correct the record's intrinsics [fx, fy, cx, cy, width, height]",
        )  # fmt: skip
    no_crop = rng is None or (0, 0) in (geometry.crop_width, geometry.crop_height)
    crop_height = math.inf if no_crop else rng.uniform(*geometry.crop_height)
    crop_width = math.inf if no_crop else rng.uniform(*geometry.crop_width)
    if geometry.mode == "official":
        return _plan_official(camera, geometry.focal_px, crop_width, crop_height)
    centred = no_crop or geometry.crop_position == "centred"
    position = (0.5, 0.5) if centred else (rng.uniform(0, 1), rng.uniform(0, 1))
    return _plan_corrected(camera, geometry.focal_px, grid, (crop_width, crop_height), position)


def _plan_corrected(
    camera: Camera, focal_px: float, grid: int, crop: tuple[float, float], position: tuple[float, float]
) -> View:
    wanted_x, wanted_y = (focal_px / camera.fx, focal_px / camera.fy) if focal_px else (1.0, 1.0)
    left, right, width = _plan_axis(camera.width, wanted_x, grid, crop[0], position[0])
    top, bottom, height = _plan_axis(camera.height, wanted_y, grid, crop[1], position[1])
    real_x, real_y = width / (right - left), height / (bottom - top)
    seen = Camera(
        fx=camera.fx * real_x,
        fy=camera.fy * real_y,
        cx=(camera.cx + 0.5 - left) * real_x - 0.5,
        cy=(camera.cy + 0.5 - top) * real_y - 0.5,
        width=width,
        height=height,
    )
    return View(camera, seen, (left, top, right, bottom), (width, height), (0, 0), official=False)


def _plan_axis(length: int, scale: float, grid: int, drawn: float, position: float) -> tuple[float, float, int]:
    """Returns start and end of the kept part in source px, and its size in the result."""
    scaled = length * scale
    if scaled < max(drawn, grid):  # too short to crop: the whole axis, to the nearest multiple of the grid
        return 0.0, float(length), grid * max(1, math.floor(scaled / grid + 0.5))
    size = grid * max(1, math.floor(drawn / grid))
    kept = min(size / scale, float(length))
    start = (length - kept) * position
    return start, min(start + kept, float(length)), size


def _plan_official(camera: Camera, focal_px: float, crop_width: float, crop_height: float) -> View:
    scale = focal_px / camera.fx if focal_px else 1.0
    resized = int(camera.width * scale), int(camera.height * scale)
    width, height = int(min(resized[0], crop_width)), int(min(resized[1], crop_height))
    left, top = max(0, (resized[0] - width) // 2), max(0, (resized[1] - height) // 2)
    fx, fy, cx, cy = (scale * value for value in (camera.fx, camera.fy, camera.cx, camera.cy))
    seen = Camera(fx, fy, cx - left, cy - top, width, height)
    whole = (0.0, 0.0, float(camera.width), float(camera.height))
    return View(camera, seen, whole, resized, (left, top), official=True)


def apply_view(view: View, image: np.ndarray) -> np.ndarray:
    """Returns the uint8 image (height, width, 3) that the view shows, resampled once (bicubic, antialiased).

    Raises:
      InputError: the image is not of the size that the camera was given for.
    """
    if image.shape[:2] != (view.source.height, view.source.width):
        raise InputError(
            "image: its size is not the one of its intrinsics",
            found=f"{image.shape[1]}x{image.shape[0]} px", expected=f"{view.source.width}x{view.source.height} px",
            fix="give the intrinsics [fx, fy, cx, cy, width, height] of this very image",
        )  # fmt: skip
    left, top = view.corner
    resized = Image.fromarray(image).resize(view.resized, Image.Resampling.BICUBIC, box=view.box)
    return np.asarray(resized)[top : top + view.camera.height, left : left + view.camera.width]


def project_points(view: View, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where source points lie in the result, and which of them are inside.

    Args:
      view: from `plan_view`.
      points: (N, 2) x, y in source px, float or integer.

    Returns:
      (N, 2) int64 x, y: the nearest pixel (official: truncated), clamped to the image; (N,) bool: needed no clamp.
    """
    points = np.asarray(points, np.float64).reshape(-1, 2)
    size = np.array([view.camera.width, view.camera.height])
    pixels = _project_official(view, points) if view.official else _project_corrected(view, points, size)
    inside = np.all((pixels >= 0) & (pixels < size), axis=1)
    return np.clip(pixels, 0, size - 1), inside


def _project_corrected(view: View, points: np.ndarray, size: np.ndarray) -> np.ndarray:
    start, end = np.array(view.box[:2]), np.array(view.box[2:])
    centres = (points + 0.5 - start) * (size / (end - start)) - 0.5
    return np.floor(centres + 0.5).astype(np.int64)


def _project_official(view: View, points: np.ndarray) -> np.ndarray:
    source, seen, corner = view.source, view.camera, np.array(view.corner)
    centre = np.array([source.cx, source.cy])
    ratio = np.array([seen.fx / source.fx, seen.fy / source.fy])
    new_centre = np.array([seen.cx, seen.cy]) + corner
    return np.trunc((points - centre) * ratio + new_centre).astype(np.int64) - corner


def check_pixels(view: View, min_pixels: int, max_pixels: int) -> None:
    """Raises InputError if the result has fewer or more pixels than the checkpoint's image processor allows."""
    width, height = view.camera.width, view.camera.height
    if not min_pixels <= width * height <= max_pixels:
        raise InputError(
            "image: its size at the unified focal length is outside the checkpoint's limits",
            found=f"{width}x{height} = {width * height} px, from {view.source.width}x{view.source.height} px",
            expected=f"{min_pixels} to {max_pixels} px",
            fix="change data.geometry.focal_px or the crop sizes, or correct the record's intrinsics",
        )  # fmt: skip


def z_to_ray_factor(camera: Camera, points: np.ndarray) -> np.ndarray:
    """Returns (N,) float64 ≥ 1: distance from the camera centre = z-depth × factor, at the camera's own pixels."""
    points = np.asarray(points, np.float64).reshape(-1, 2)
    x, y = (points[:, 0] - camera.cx) / camera.fx, (points[:, 1] - camera.cy) / camera.fy
    return np.sqrt(1 + x**2 + y**2)


def convert_depth(camera: Camera, points: np.ndarray, depth_m: np.ndarray, from_kind: str, to_kind: str) -> np.ndarray:
    """Returns (N,) depths in metres as `to_kind`: z (along the principal axis) or ray (Euclidean).

    Raises:
      InputError: a kind that is neither.
    """
    if (from_kind, to_kind) not in RAY_POWER:
        raise InputError(
            "depth: unknown kind", found=f"{from_kind!r} to {to_kind!r}", expected="z or ray",
            fix="correct depth_kind of the record, or data.label_kind",
        )  # fmt: skip
    return np.asarray(depth_m, np.float64) * z_to_ray_factor(camera, points) ** RAY_POWER[from_kind, to_kind]


def smart_size(height: int, width: int, grid: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns (height, width) in px, multiples of the grid, that Qwen's processor resizes an image to.

    Raises:
      InputError: one side is more than 200 times the other.

    Source: HF `smart_resize` of Qwen2-VL.
    """
    sides = height, width
    if max(sides) > MAX_ASPECT * min(sides):
        raise InputError(
            "image: too long and narrow", found=f"{width}x{height} px", expected=f"aspect ratio up to {MAX_ASPECT}",
            fix="crop the image",
        )  # fmt: skip
    snapped = [grid * round(side / grid) for side in sides]
    if math.prod(snapped) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        snapped = [grid * max(1, math.floor(side / shrink / grid)) for side in sides]
    elif math.prod(snapped) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        snapped = [grid * math.ceil(side * grow / grid) for side in sides]
    return snapped[0], snapped[1]


def snap_to_grid(image: np.ndarray, grid: int, min_pixels: int, max_pixels: int) -> np.ndarray:
    """Returns the uint8 image after the second resize that official images need, see `smart_size`."""
    height, width = smart_size(*image.shape[:2], grid, min_pixels, max_pixels)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
