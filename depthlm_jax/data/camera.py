"""How a source image becomes the model's image, and where its pixels, focal lengths and depths go.

The pixel convention of the package: an integer (x, y) is the CENTRE of a pixel, x right, y down, (0, 0) at the top
left. A pixel reaches from −0.5 to +0.5, so an image of W×H px covers [−0.5, W−0.5] × [−0.5, H−0.5]. Boxes alone are
given as edges, from 0 to W: edge = x + 0.5. A resize by s therefore maps x to (x + 0.5)·s − 0.5, and cx likewise.

`corrected` geometry lands on the patch grid with one resample of the visible box, and tracks the scales that really
happened. `official` geometry repeats the release: one scale from fx for both axes, truncation, centred crop.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from depthlm_jax.config import Geometry
from depthlm_jax.errors import InputError

RAY_POWER = {("z", "z"): 0, ("ray", "ray"): 0, ("z", "ray"): 1, ("ray", "z"): -1}
OFFICIAL_LABELS = {  # data set → kind and scale of the release's labels; others: as the record says
    "argoverse2": ("ray", 1.0), "waymo": ("ray", 1.0), "nuscenes": ("z", 1.0), "ddad": ("z", 1.0),
    "matterport3d": ("ray", 1.0), "eth3d": ("ray", 1.0), "sunrgbd": ("ray", 0.8), "nyuv2": ("ray", 0.8),
    "ibims1": ("z", 1.0),
}  # fmt: skip
MAX_ASPECT = 200  # of Qwen's processor
MAX_SCALE = 2.0**31  # keeps the size of an absurd focal length a number, for `check_pixels` to refuse
REDUCTIONS = (4, 2)  # at which libjpeg decodes in a fraction of the time; at 8 it aliases and saves little more
LOST_DETAIL = 1.05  # a source may be decoded smaller than its view by this much: not visible, and far faster
ANTIALIAS_BELOW = 0.95  # scale; above it nothing is seen
CONTEXT_PX = 4  # what filters read beyond the end of a box


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
class Chance:
    """Numbers in [0, 1) that decide one training view; `view_size` takes them as columns in this order."""

    crop_height: float
    crop_width: float
    x: float
    y: float
    flip: float
    aspect: float


@dataclass(frozen=True)
class View:
    """One way to look at a source image: `box` of it is resized to `resized`, cropped from `corner` on, mirrored."""

    source: Camera
    camera: Camera  # of the result
    box: tuple[float, float, float, float]  # left, top, right, bottom edges in source px, from 0 to W and H
    resized: tuple[int, int]  # width, height
    corner: tuple[int, int]  # left, top of the result in the resized image
    official: bool
    flipped: bool  # mirrored left to right, last
    reduction: int  # the source may be decoded at 1/reduction of its size; left and top of the box are multiples of it


def plan_view(
    camera: Camera, geometry: Geometry, grid: int, chance: Chance | None,
    aspect_jitter: tuple[float, float] = (1.0, 1.0),
) -> View:  # fmt: skip
    """Returns the view of an image under a geometry; pixels are not needed.

    Args:
      camera: of the source image.
      geometry: `focal_px` 0 leaves the scale at 1; `crop_width` or `crop_height` (0, 0) switches the crop off.
      grid: px that the sides of a corrected view are multiples of: patch × merge.
      chance: decides crop, flip and jitter; None: none of them, as in evaluation. In official mode `crop_height` and
        `crop_width` are the release's first two numbers, or `aspect` its first one.
      aspect_jitter: range of the factor that the image is squeezed in height by; labels stay as they are. Official
        images that are squeezed are not cropped.

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
    draws = None if chance is None else (chance.crop_height, chance.crop_width, chance.aspect)
    wanted = _wanted(camera.fx, camera.fy, geometry, draws, aspect_jitter)
    flipped = chance is not None and chance.flip < geometry.flip
    if geometry.mode == "official":
        return _plan_official(camera, wanted, flipped)
    centred = chance is None or geometry.crop_position == "centred"
    return _plan_corrected(camera, grid, wanted, (0.5, 0.5) if centred else (chance.x, chance.y), flipped)


def view_size(
    width_N: np.ndarray, height_N: np.ndarray, fx_N: np.ndarray, fy_N: np.ndarray, geometry: Geometry, grid: int,
    chance_N6: np.ndarray | None, aspect_jitter: tuple[float, float] = (1.0, 1.0),
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Returns (width_N, height_N) int64 in px of the views that `plan_view` gives for the same numbers.

    Args:
      width_N, height_N, fx_N, fy_N: of the source images in px. Where one is not positive and finite the result is
        one grid cell: `plan_view` or the decoder refuses that record later.
      geometry, grid, aspect_jitter: as for `plan_view`.
      chance_N6: fields of `Chance`, in their order; None: evaluation.
    """
    source_4N = np.array([width_N, height_N, fx_N, fy_N], np.float64)
    sound_N = np.all((source_4N > 0) & (source_4N < math.inf), axis=0)
    width_N, height_N, fx_N, fy_N = np.where(sound_N, source_4N, 1.0)
    draws = None if chance_N6 is None else (chance_N6[:, 0], chance_N6[:, 1], chance_N6[:, 5])
    with np.errstate(over="ignore"):  # focal lengths near zero; MAX_SCALE bounds the result
        wanted = _wanted(fx_N, fy_N, geometry, draws, aspect_jitter)
    if geometry.mode == "official":
        size = _official_sizes(width_N, height_N, wanted)[2:]
    else:
        size = (
            _corrected_size(width_N, wanted.scale_x, wanted.crop_width, grid)[0],
            _corrected_size(height_N, wanted.scale_y, wanted.crop_height, grid)[0],
        )
    seen_width_N, seen_height_N = (np.where(sound_N, side_N, grid).astype(np.int64) for side_N in size)
    return seen_width_N, seen_height_N


@dataclass(frozen=True)
class _Wanted:
    """What geometry and chance ask for, numbers or arrays over records; inf: no crop."""

    scale_x: float | np.ndarray
    scale_y: float | np.ndarray
    crop_width: float | np.ndarray
    crop_height: float | np.ndarray
    squeeze: float | np.ndarray
    squeezed: bool


def _wanted(fx, fy, geometry: Geometry, draws: tuple | None, aspect_jitter: tuple[float, float]) -> _Wanted:
    """`draws`: numbers in [0, 1) for crop height, crop width and aspect."""
    official = geometry.mode == "official"
    squeezed = draws is not None and tuple(aspect_jitter) != (1.0, 1.0)
    no_crop = draws is None or (0, 0) in (geometry.crop_width, geometry.crop_height) or (official and squeezed)
    crop_height = math.inf if no_crop else _between(geometry.crop_height, draws[0])
    crop_width = math.inf if no_crop else _between(geometry.crop_width, draws[1])
    squeeze = _between(aspect_jitter, draws[2]) if squeezed else 1.0
    scale_x = np.minimum(geometry.focal_px / fx, MAX_SCALE) if geometry.focal_px else 1.0
    scale_y = np.minimum(geometry.focal_px / fy, MAX_SCALE) if geometry.focal_px else 1.0
    return _Wanted(scale_x, scale_x if official else scale_y / squeeze, crop_width, crop_height, squeeze, squeezed)


def _between(ends: tuple[float, float], share):
    return ends[0] + (ends[1] - ends[0]) * share  # as random.uniform computes it, to the last bit


def _corrected_size(length, scale, drawn, grid: int):
    """Returns px of the result along one axis, and px of the source that it shows; numbers or arrays."""
    scaled = length * scale
    whole = scaled < np.maximum(drawn, grid)  # too short to crop: the nearest multiple of the grid
    size = grid * np.maximum(1.0, np.floor(np.where(whole, scaled / grid + 0.5, drawn / grid)))
    return size, np.where(whole, length, np.minimum(size / scale, length))


def _plan_corrected(camera: Camera, grid: int, wanted: _Wanted, position: tuple[float, float], flipped: bool) -> View:
    width, shown_x = (v.item() for v in _corrected_size(camera.width, wanted.scale_x, wanted.crop_width, grid))
    height, shown_y = (v.item() for v in _corrected_size(camera.height, wanted.scale_y, wanted.crop_height, grid))
    scale_x, scale_y = width / shown_x, height / shown_y
    reduction = next((n for n in REDUCTIONS if n * max(scale_x, scale_y) <= LOST_DETAIL), 1)
    # Whole px of the decoded image: the resample then needs no shift.
    left = reduction * math.floor((camera.width - shown_x) * position[0] / reduction)
    top = reduction * math.floor((camera.height - shown_y) * position[1] / reduction)
    box = float(left), float(top), min(left + shown_x, camera.width), min(top + shown_y, camera.height)
    cx, cy = (camera.cx + 0.5 - left) * scale_x - 0.5, (camera.cy + 0.5 - top) * scale_y - 0.5
    size = int(width), int(height)
    seen = Camera(camera.fx * scale_x, camera.fy * scale_y, size[0] - 1 - cx if flipped else cx, cy, *size)
    return View(camera, seen, box, size, (0, 0), False, flipped, reduction)


def _official_sizes(width, height, wanted: _Wanted) -> tuple:
    """Returns width and height after the resize, and after the crop; numbers or arrays."""
    resized_width = np.floor(width * wanted.scale_x)
    resized_height = np.floor(resized_width / wanted.squeeze if wanted.squeezed else height * wanted.scale_x)
    width = np.floor(np.minimum(resized_width, wanted.crop_width))
    height = np.floor(np.minimum(resized_height, wanted.crop_height))
    return resized_width, resized_height, width, height


def _plan_official(camera: Camera, wanted: _Wanted, flipped: bool) -> View:
    scale = float(wanted.scale_x)
    sizes = _official_sizes(camera.width, camera.height, wanted)
    resized_width, resized_height, width, height = (int(size) for size in sizes)
    left, top = (resized_width - width) // 2, (resized_height - height) // 2
    fx, fy, cx, cy = (scale * value for value in (camera.fx, camera.fy, camera.cx, camera.cy))
    if wanted.squeezed:
        ratio = resized_height / max(1, int(camera.height * scale))
        fy, cy = fy * ratio, cy * ratio
    cx -= left
    seen = Camera(fx, fy, width - 1 - cx if flipped else cx, cy - top, width, height)
    whole = (0.0, 0.0, float(camera.width), float(camera.height))
    return View(camera, seen, whole, (resized_width, resized_height), (left, top), True, flipped, 1)


def apply_view(view: View, image: np.ndarray, reduction: int = 1) -> np.ndarray:
    """Returns the uint8 image (height, width, 3) that the view shows, resampled once, antialiased.

    Args:
      view: from `plan_view`.
      image: (H, W, 3) uint8, the source.
      reduction: 1, or `view.reduction` if the image was decoded at 1/reduction of its size, rounded up.

    Raises:
      InputError: the image is not of the size that the camera was given for.
    """
    size = -(-view.source.width // reduction), -(-view.source.height // reduction)
    if image.shape[1::-1] != size:
        raise InputError(
            "image: its size is not the one of its intrinsics",
            found=f"{image.shape[1]}x{image.shape[0]} px", expected=f"{size[0]}x{size[1]} px",
            fix="give the intrinsics [fx, fy, cx, cy, width, height] of this very image",
        )  # fmt: skip
    seen = _resize_official(view, image) if view.official else _resample(view, image, reduction)
    return cv2.flip(seen, 1) if view.flipped else seen


def _resize_official(view: View, image: np.ndarray) -> np.ndarray:
    left, top = view.corner
    resized = np.asarray(Image.fromarray(image).resize(view.resized, Image.Resampling.BICUBIC))
    return resized[top : top + view.camera.height, left : left + view.camera.width]


def _resample(view: View, image: np.ndarray, reduction: int) -> np.ndarray:
    """Pillow's bicubic to a fraction of a grey level, several times faster; the box's corner is treated as a border."""
    cv2.setNumThreads(1)  # for the whole process: rows are made side by side, more threads would only get in their way
    left, top, right, bottom = (edge / reduction for edge in view.box)
    scale_x, scale_y = view.camera.width / (right - left), view.camera.height / (bottom - top)
    shown = image[int(top) : math.ceil(bottom) + CONTEXT_PX, int(left) : math.ceil(right) + CONTEXT_PX]
    if min(scale_x, scale_y) < ANTIALIAS_BELOW:
        kernels = _antialias_kernel(scale_x), _antialias_kernel(scale_y)
        shown = cv2.sepFilter2D(shown, -1, *kernels, borderType=cv2.BORDER_REPLICATE)
    resized = cv2.resize(shown, None, fx=scale_x, fy=scale_y, interpolation=cv2.INTER_CUBIC)
    return resized[: view.camera.height, : view.camera.width]


def _antialias_kernel(scale: float) -> np.ndarray:
    """Returns float32 weights, applied before OpenCV's cubic, that make of it Pillow's wider cubic for shrinking.

    Source: Pillow's BICUBIC (a = −0.5, stretched by 1/scale), OpenCV's INTER_CUBIC (a = −0.75, never stretched); the
      weights are the least-squares fit of one by the other.
    """
    if scale >= ANTIALIAS_BELOW:
        return np.ones(1, np.float32)
    radius = math.ceil(2 / scale) - 1
    x = np.linspace(-radius - 2, radius + 2, 16 * (radius + 2) + 1)
    moved = _cubic(x[:, None] - np.arange(-radius, radius + 1), -0.75)
    weights = np.linalg.lstsq(moved, scale * _cubic(x * scale, -0.5), rcond=None)[0]
    return (weights / weights.sum()).astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def project(view: View, points: np.ndarray) -> np.ndarray:
    """Returns (N, 2) float64 x, y where source points lie in the result, not rounded, inside or not."""
    placed = _place(view, points) - np.array(view.corner)
    return _mirror(view, placed)


def unproject(view: View, pixels: np.ndarray) -> np.ndarray:
    """Returns (N, 2) float64 x, y in source px of positions in the result: the inverse of `project`."""
    source, seen = view.source, view.camera
    rays = viewing_slopes(seen, pixels) * (-1 if view.flipped else 1, 1)
    return rays * (source.fx, source.fy) + (source.cx, source.cy)


def project_points(view: View, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where source points lie in the result, and which of them are inside.

    Args:
      view: from `plan_view`.
      points: (N, 2) x, y in source px, float or integer.

    Returns:
      (N, 2) int64 x, y: the nearest pixel (official: truncated), clamped to the image; (N,) bool: needed no clamp.
    """
    placed = _place(view, points)
    size = np.array([view.camera.width, view.camera.height])
    whole = np.trunc(placed) if view.official else np.floor(placed + 0.5)
    pixels = whole.astype(np.int64) - np.array(view.corner)
    inside = np.all((pixels >= 0) & (pixels < size), axis=1)
    return _mirror(view, np.clip(pixels, 0, size - 1)), inside


def _place(view: View, points: np.ndarray) -> np.ndarray:
    """Returns float64 positions in the resized image, before crop and flip."""
    points = np.asarray(points, np.float64).reshape(-1, 2)
    start, end = np.array(view.box[:2]), np.array(view.box[2:])
    if not view.official:
        return (points + 0.5 - start) * (np.array(view.resized) / (end - start)) - 0.5
    source, seen = view.source, view.camera
    seen_cx = seen.width - 1 - seen.cx if view.flipped else seen.cx
    ratio = np.array([seen.fx / source.fx, seen.fy / source.fy])
    return (points - (source.cx, source.cy)) * ratio + (np.array([seen_cx, seen.cy]) + np.array(view.corner))


def _mirror(view: View, pixels: np.ndarray) -> np.ndarray:
    return pixels * (-1, 1) + (view.camera.width - 1, 0) if view.flipped else pixels


def check_pixels(view: View, min_pixels: int, max_pixels: int, longest_px: int) -> None:
    """Raises InputError if the checkpoint's image processor would resize the result."""
    width, height = view.camera.width, view.camera.height
    if not (min_pixels <= width * height <= max_pixels and max(width, height) <= (longest_px or math.inf)):
        longest = f", sides up to {longest_px} px" if longest_px else ""
        raise InputError(
            "image: its size at the unified focal length is outside the checkpoint's limits",
            found=f"{width}x{height} = {width * height} px, from {view.source.width}x{view.source.height} px",
            expected=f"{min_pixels} to {max_pixels} px{longest} (preprocessor_config.json)",
            fix="change data.geometry.focal_px or the crop sizes, or correct the record's intrinsics",
        )  # fmt: skip


def viewing_slopes(camera: Camera, points: np.ndarray) -> np.ndarray:
    """Returns (N, 2) float64: x and y at z = 1 of what the camera sees at (N, 2) px."""
    points = np.asarray(points, np.float64).reshape(-1, 2)
    return (points - (camera.cx, camera.cy)) / (camera.fx, camera.fy)


def viewing_ray(camera: Camera, x: float, y: float) -> np.ndarray:
    """Returns (3,) float64, the unit vector from the camera centre towards a pixel: x right, y down, z forward."""
    ray = np.append(viewing_slopes(camera, (x, y))[0], 1.0)
    return ray / np.linalg.norm(ray)


def points_in_camera(camera: Camera, points: np.ndarray, z_m: np.ndarray) -> np.ndarray:
    """Returns (N, 3) float64 in metres, x right, y down, z forward, of (N, 2) px with (N,) z-depths."""
    slopes = viewing_slopes(camera, points)
    z_m = np.asarray(z_m, np.float64).reshape(-1, 1)
    return np.concatenate([slopes * z_m, z_m], axis=1)


def z_to_ray_factor(camera: Camera, points: np.ndarray) -> np.ndarray:
    """Returns (N,) float64 ≥ 1: distance from the camera centre = z-depth × factor, at the camera's own pixels."""
    return np.sqrt(1 + np.sum(viewing_slopes(camera, points) ** 2, axis=1))


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


def label_depth(
    dataset: str, camera: Camera, points: np.ndarray, depth_m: np.ndarray, from_kind: str, label_kind: str
) -> np.ndarray:
    """Returns (N,) depths in metres that the answers are to say.

    Args:
      dataset: of the record, as in OFFICIAL_LABELS.
      camera, points: of the source image.
      depth_m: (N,) true depths of `from_kind`, z or ray.
      label_kind: z, ray, or official: what the release's labels hold, z here and ray there, errors included.

    Raises:
      InputError: an unknown kind.
    """
    if label_kind != "official":
        return convert_depth(camera, points, depth_m, from_kind, label_kind)
    if dataset == "scannetpp":  # the release forgets to multiply the slopes by z
        z_m = convert_depth(camera, points, depth_m, from_kind, "z")
        return np.sqrt(np.sum(viewing_slopes(camera, points) ** 2, axis=1) + z_m**2)
    kind, scale = OFFICIAL_LABELS.get(dataset, (from_kind, 1.0))
    return scale * convert_depth(camera, points, depth_m, from_kind, kind)


def processor_size(
    height: int, width: int, grid: int, min_pixels: int, max_pixels: int, longest_px: int
) -> tuple[int, int]:
    """Returns (height, width) in px, multiples of the grid, that the model's own image processor resizes an image to.

    Args:
      height: of the image, px.
      width: likewise.
      grid: px.
      min_pixels: of the result, where longest_px is 0.
      max_pixels: likewise.
      longest_px: Pixtral's limit of a side; 0: Qwen's rule, which goes by the number of pixels.

    Raises:
      InputError: one side is more than 200 times the other.

    Source: HF `smart_resize` of Qwen2-VL, `get_resize_output_image_size` of Pixtral.
    """
    sides = height, width
    if longest_px:
        ratio = max(1.0, max(sides) / longest_px)
        return tuple(grid * math.ceil(max(1, math.floor(side / ratio)) / grid) for side in sides)
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


def snap_to_grid(image: np.ndarray, grid: int, min_pixels: int, max_pixels: int, longest_px: int) -> np.ndarray:
    """Returns the uint8 image after the second resize that official images need, see `processor_size`."""
    height, width = processor_size(*image.shape[:2], grid, min_pixels, max_pixels, longest_px)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
