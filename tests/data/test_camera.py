import dataclasses
import json
import math
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from depthlm_jax.config import Geometry
from depthlm_jax.data import camera as cam
from depthlm_jax.errors import InputError

IBIMS = Path(__file__).parents[2].parent / "shared" / "data" / "ibims1"
CORRIDOR = cam.Camera(559.62, 558.14, 361.87, 241.99, 640, 480)
STREET = cam.Camera(1266.4, 1250.0, 816.3, 491.5, 1600, 900)  # longer focal length than the unified one
WIDE = cam.Camera(600.0, 620.0, 1010.0, 700.0, 2000, 1500)
OFFICIAL_750 = Geometry(mode="official", focal_px=750.0)
GRID = 28
BLANK = np.zeros((480, 640, 3), np.uint8)


def chance(seed):
    return cam.Chance(*np.random.default_rng(seed).random(6))


def release_chance(seed):
    """The release draws the crop height first, then the width, from one Python stream."""
    rng = random.Random(seed)
    return cam.Chance(crop_height=rng.random(), crop_width=rng.random(), x=0.0, y=0.0, flip=0.5, aspect=0.5)


def training_views(camera, count=50, **geometry):
    return [cam.plan_view(camera, Geometry(**geometry), GRID, chance(seed)) for seed in range(count)]


def hand_made(source, size, box, flipped=False):
    return cam.View(source, cam.Camera(600, 620, 0, 0, *size), box, size, (0, 0), False, flipped, 1)


# --- official: golden values of the release -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw, expected", [((618, 74), (828, 99)), ((47, 97), (62, 129)), ((519, 129), (695, 172)), ((45, 56), (60, 75))]
)
def test_official_evaluation_reproduces_the_release(raw, expected):
    view = cam.plan_view(CORRIDOR, OFFICIAL_750, GRID, None)
    pixels, inside = cam.project_points(view, np.array([raw]))
    assert cam.apply_view(view, BLANK).shape == (643, 857, 3)
    assert tuple(pixels[0]) == expected and inside[0]


def test_official_scales_both_axes_by_fx():
    seen = cam.plan_view(CORRIDOR, OFFICIAL_750, GRID, None).camera
    assert np.round([seen.fx, seen.fy, seen.cx, seen.cy], 4).tolist() == [750.0, 748.0165, 484.9764, 324.3138]


def test_official_image_is_pillows_default_resize_of_the_real_image():
    if not IBIMS.exists():
        pytest.skip(f"{IBIMS} is absent")
    image = Image.open(IBIMS / "rgb" / "corridor_01.png").convert("RGB")
    view = cam.plan_view(CORRIDOR, OFFICIAL_750, GRID, None)
    assert np.array_equal(cam.apply_view(view, np.asarray(image)), np.asarray(image.resize((857, 643))))


def test_official_crop_is_centred_and_draws_the_height_first():
    view = cam.plan_view(STREET, Geometry(mode="official"), GRID, release_chance(3))
    expected = random.Random(3)
    height, width = int(min(710, expected.uniform(700, 1200))), int(min(1263, expected.uniform(1000, 1400)))
    assert view.resized == (1263, 710)
    assert (view.camera.width, view.camera.height) == (width, height)
    assert view.corner == ((1263 - width) // 2, (710 - height) // 2)
    assert view.camera.cx == pytest.approx(816.3 * 1000 / 1266.4 - view.corner[0])


def test_official_crop_is_the_middle_of_the_resized_image():
    image = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    view = cam.plan_view(WIDE, Geometry(mode="official"), GRID, release_chance(0))
    whole = np.asarray(Image.fromarray(image).resize(view.resized))
    (left, top), width, height = view.corner, view.camera.width, view.camera.height
    assert np.array_equal(cam.apply_view(view, image), whole[top : top + height, left : left + width])
    points = np.array([[1000, 750], [5, 750], [1000, 1495]])
    pixels, inside = cam.project_points(view, points)
    assert inside.tolist() == [True, False, False]
    assert pixels[0].tolist() == [int(1000 / 0.6) - left, int(750 / 0.6) - top]


# --- corrected: sizes, intrinsics, boxes --------------------------------------------------------------------------


@pytest.mark.parametrize("focal_px, size", [(1000.0, (1148, 868)), (750.0, (868, 644)), (0.0, (644, 476))])
def test_evaluation_lands_on_the_grid_and_tracks_the_real_scale(focal_px, size):
    seen = cam.plan_view(CORRIDOR, Geometry(focal_px=focal_px), GRID, None).camera
    assert (seen.width, seen.height) == size
    assert seen.fx == pytest.approx(CORRIDOR.fx * size[0] / 640)
    assert seen.fy == pytest.approx(CORRIDOR.fy * size[1] / 480)
    if focal_px:
        assert abs(seen.fx / focal_px - 1) <= GRID / (2 * size[0]) * 1.001
        assert abs(seen.fy / focal_px - 1) <= GRID / (2 * size[1]) * 1.001


@pytest.mark.parametrize("crop", [{"crop_width": (0, 0)}, {"crop_height": (0, 0)}])
def test_crop_of_zero_is_no_crop(crop):
    (view,) = training_views(WIDE, 1, **crop)
    assert view == cam.plan_view(WIDE, Geometry(), GRID, None)


def test_random_crops_have_exactly_the_unified_focal_length():
    views = training_views(WIDE)
    for view in views:
        seen, (left, top, right, bottom) = view.camera, view.box
        assert (seen.fx, seen.fy) == pytest.approx((1000, 1000), rel=1e-12)
        assert seen.width % GRID == seen.height % GRID == 0
        assert 1000 - GRID < seen.width <= 1400 and 700 - GRID < seen.height <= 1200
        assert 0 <= left < right <= WIDE.width and 0 <= top < bottom <= WIDE.height
        assert left % view.reduction == top % view.reduction == 0
    assert len({view.camera.width for view in views}) > 5 and len({view.camera.height for view in views}) > 5
    assert np.std([view.camera.cx for view in views]) > 100  # principal-point diversity


def test_centred_crops_keep_the_middle_in_the_middle():
    for view in training_views(WIDE, crop_position="centred"):
        left, top, right, bottom = view.box
        assert (left + right, top + bottom) == pytest.approx((WIDE.width, WIDE.height), abs=2)  # whole px


def test_axis_shorter_than_the_drawn_size_is_kept_whole():
    for view in training_views(CORRIDOR, crop_width=(1000, 1100), crop_height=(900, 1200)):
        assert view.box[1::2] == (0.0, 480.0) and view.camera.height == 868  # 860 px at f = 1000
        assert view.box[2] - view.box[0] < 640 and view.camera.fx == pytest.approx(1000)


def test_image_smaller_than_the_grid_becomes_one_cell():
    tiny = cam.Camera(1000.0, 1000.0, 5.0, 4.0, 10, 9)
    seen = cam.plan_view(tiny, Geometry(crop_width=(1, 5), crop_height=(1, 5)), GRID, chance(0)).camera
    assert (seen.width, seen.height) == (GRID, GRID)


def test_box_never_leaves_the_image_when_the_crop_is_just_as_large():
    for focal in np.random.default_rng(0).uniform(100, 3000, 500):
        camera = cam.Camera(focal, focal, 320.0, 240.0, 640, 480)
        exact = (math.floor(640 * (1000 / focal)),) * 2
        geometry = Geometry(crop_width=exact, crop_height=exact)
        box = cam.plan_view(camera, geometry, 1, chance(1)).box
        assert 0 <= box[0] < box[2] <= 640 and 0 <= box[1] < box[3] <= 480


def test_view_is_a_function_of_its_chance():
    first, second = (cam.plan_view(WIDE, Geometry(), GRID, chance(1)) for _ in range(2))
    assert first == second != cam.plan_view(WIDE, Geometry(), GRID, chance(2))


@pytest.mark.parametrize("flip, mirrored", [(0.0, (0, 0)), (0.25, (30, 70)), (1.0, (200, 200))])
def test_flip_is_a_probability(flip, mirrored):
    views = training_views(WIDE, 200, flip=flip)
    assert mirrored[0] <= sum(view.flipped for view in views) <= mirrored[1]
    assert not cam.plan_view(WIDE, Geometry(flip=1.0), GRID, None).flipped


def test_mirrored_view_has_a_mirrored_principal_point():
    plain, mirrored = (cam.plan_view(WIDE, Geometry(flip=flip), GRID, chance(0)).camera for flip in (0.0, 1.0))
    assert mirrored == dataclasses.replace(plain, cx=plain.width - 1 - plain.cx)


def test_aspect_jitter_squeezes_the_height_and_the_focal_length():
    crop = Geometry(crop_width=(700, 900), crop_height=(300, 400))
    plain, squeezed = (cam.plan_view(WIDE, crop, GRID, chance(3), jitter) for jitter in [(1.0, 1.0), (1.0, 1.3)])
    ratio = 1.0 + 0.3 * chance(3).aspect
    assert (plain.camera.fx, plain.camera.fy) == pytest.approx((1000, 1000))
    assert (squeezed.camera.fx, squeezed.camera.fy) == pytest.approx((1000, 1000 / ratio))
    assert squeezed.box[3] - squeezed.box[1] == pytest.approx((plain.box[3] - plain.box[1]) * ratio)
    assert cam.plan_view(WIDE, crop, GRID, None, (1.0, 1.3)) == cam.plan_view(WIDE, crop, GRID, None)


def test_official_aspect_jitter_is_not_cropped():
    """Source: METHOD of the release for Taskonomy: W' = int(512·s), then H'' = int(W'/r)."""
    room = cam.Camera(400.0, 410.0, 255.0, 250.0, 512, 512)
    view = cam.plan_view(room, Geometry(mode="official"), GRID, chance(1), (1.0, 1.3))
    height = int(1280 / (1.0 + 0.3 * chance(1).aspect))
    assert view.resized == (view.camera.width, view.camera.height) == (1280, height)
    assert view.camera.fy == pytest.approx(410 * 2.5 * height / 1280)
    assert view.camera.cy == pytest.approx(250 * 2.5 * height / 1280)
    assert cam.apply_view(view, np.zeros((512, 512, 3), np.uint8)).shape == (height, 1280, 3)


@pytest.mark.parametrize("bad", [0.0, -5.0, math.nan, math.inf])
@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("mode", ["corrected", "official"])
def test_size_of_a_record_that_makes_no_sense_is_one_cell(bad, column, mode):
    numbers = np.full((4, 3), 500.0)
    numbers[column, 1] = bad
    for chances in (None, np.full((3, 6), 0.5)):
        width_N, height_N = cam.view_size(*numbers, Geometry(mode=mode), GRID, chances)
        assert (width_N[1], height_N[1]) == (GRID, GRID)
        assert (width_N[0], height_N[2]) != (GRID, GRID)


def test_absurdly_short_focal_length_is_refused_by_its_size():
    camera = cam.Camera(5e-324, 1e-300, 10.0, 10.0, 640, 480)
    for mode in ("corrected", "official"):
        for drawn in (None, chance(0)):
            geometry = Geometry(mode=mode, crop_width=(0, 0))
            with pytest.raises(InputError, match="outside the checkpoint's limits"):
                cam.check_pixels(cam.plan_view(camera, geometry, GRID, drawn), 1, 10**8, 0)


# --- corrected: pixels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("focal_px", [300.0, 100.0, 81.0, 47.0, 25.0])  # enlarged to shrunk more than four times
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_pixels_lie_where_the_convention_says(seed, focal_px, flip):
    """On a ramp each value names its source coordinate, so the image itself tells where it was sampled."""
    source = cam.Camera(119.3, 131.7, 100.0, 90.0, 250, 200)  # no simple ratio: rounding to uint8 averages out
    ramp_y, ramp_x = np.mgrid[0:200, 0:250]
    image = np.stack([ramp_x, ramp_y, 0 * ramp_x], -1).astype(np.uint8)
    crop = (int(0.6 * focal_px), int(1.5 * focal_px))
    geometry = Geometry(focal_px=focal_px, crop_width=crop, crop_height=crop, flip=flip)
    view = cam.plan_view(source, geometry, 4, None if seed is None else chance(seed), (0.9, 1.1))
    seen, result = view.camera, cam.apply_view(view, image).astype(float)
    assert result.shape == (seen.height, seen.width, 3)
    y, x = np.mgrid[0 : seen.height, 0 : seen.width]
    slopes_x = (x - seen.cx) / seen.fx * (-1 if view.flipped else 1)  # same ray, by the intrinsics alone
    off_x = result[..., 0] - (slopes_x * source.fx + source.cx)
    off_y = result[..., 1] - ((y - seen.cy) / seen.fy * source.fy + source.cy)
    border = 5 + int(2 * seen.fx / source.fx)  # the filter is cut there
    inner = np.s_[border:-border, border:-border]
    for off_px, scale in [(off_x[inner], seen.fx / source.fx), (off_y[inner], seen.fy / source.fy)]:
        assert abs(off_px.mean()) < 0.05 / scale  # source px: a twentieth of a pixel of the result
        assert np.abs(off_px).max() < 1.1  # uint8, rounded after each axis


@pytest.mark.parametrize("scale, grey_levels", [(1.79, 0.4), (1.02, 0.4), (0.97, 0.4), (0.79, 0.4), (0.53, 0.4)])
def test_resample_is_pillows_bicubic_to_a_fraction_of_a_grey_level(scale, grey_levels, ibims1):
    for file in sorted((ibims1 / "rgb").glob("*.png"))[:3]:
        image = Image.open(file).convert("RGB")
        camera = cam.Camera(500.0, 500.0, 320.0, 240.0, *image.size)
        view = cam.plan_view(camera, Geometry(focal_px=500 * scale), 4, None)
        size = view.camera.width, view.camera.height
        difference = cam.apply_view(view, np.asarray(image)).astype(int) - np.asarray(
            image.resize(size, Image.Resampling.BICUBIC)
        )
        assert np.abs(difference).mean() < grey_levels


@pytest.mark.parametrize("scale", [0.9, 0.75, 0.6, 0.52, 0.45, 0.3, 0.11])
def test_shrinking_does_not_alias(scale):
    """What is finer than the pixels of the result must vanish; Pillow's bicubic is the measure."""
    stripes = (127.5 + 100 * np.cos(2 * np.pi * np.arange(400) / max(2.0, 1.2 / scale))).astype(np.uint8)
    image = np.repeat(np.repeat(stripes[None, :, None], 400, 0), 3, 2)
    view = cam.plan_view(cam.Camera(1000, 1000, 200, 200, 400, 400), Geometry(focal_px=1000 * scale), 4, None)
    size = view.camera.width, view.camera.height
    by_pillow = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    inner = np.s_[4:-4, 4:-4]
    assert cam.apply_view(view, image)[inner].std() <= by_pillow[inner].std() * 1.1 + 1


@pytest.mark.parametrize("scale, grey_levels", [(1.5, 2), (0.5, 2), (0.2, 2)])
def test_crop_shows_what_the_whole_view_shows(scale, grey_levels):
    """The corner of a crop is handled as the border of an image: only a few pixels there can differ."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    image = cv2.GaussianBlur(noise, (0, 0), 2)
    geometry = Geometry(focal_px=1000 * scale, crop_width=(84, 84), crop_height=(56, 56))
    camera = cam.Camera(1000.0, 1000.0, 320.0, 240.0, 640, 480)
    view = cam.plan_view(camera, geometry, 28, chance(5))
    left, top, right, bottom = view.box
    whole = np.asarray(Image.fromarray(image).resize((84, 56), Image.Resampling.BICUBIC, box=view.box))
    assert (right - left, bottom - top) == pytest.approx((84 / scale, 56 / scale)) and left > 0 and top > 0
    difference = np.abs(cam.apply_view(view, image).astype(int) - whole)
    assert difference[4:, 4:].max() <= grey_levels and difference.mean() < 0.5


def test_resample_leaves_the_image_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), np.uint8)
    before = image.copy()
    cam.apply_view(cam.plan_view(STREET, Geometry(flip=1.0), GRID, chance(0)), image)
    assert np.array_equal(image, before)


@pytest.mark.parametrize("camera", [CORRIDOR, STREET, WIDE])
@pytest.mark.parametrize("train", [False, True])
def test_projected_points_keep_their_ray_to_half_a_pixel_without_bias(camera, train):
    points = np.random.default_rng(1).uniform(0, 1, (5000, 2)) * (camera.width, camera.height) - 0.5
    view = cam.plan_view(camera, Geometry(), GRID, chance(2) if train else None)
    pixels, inside = cam.project_points(view, points)
    seen = view.camera
    rays = (points[inside] - (camera.cx, camera.cy)) / (camera.fx, camera.fy)
    error_px = pixels[inside] - (rays * (seen.fx, seen.fy) + (seen.cx, seen.cy))
    assert np.abs(error_px).max() <= 0.5 + 1e-6
    assert np.abs(error_px.mean(axis=0)).max() < 0.05
    assert inside.all() or train


def test_official_truncation_is_biased_by_half_a_pixel():
    points = np.random.default_rng(1).integers(0, (640, 480), (5000, 2))
    view = cam.plan_view(CORRIDOR, OFFICIAL_750, GRID, None)
    pixels, _ = cam.project_points(view, points)
    assert (pixels - points * (750 / 559.62)).mean() == pytest.approx(-0.5, abs=0.05)


def test_points_outside_are_clamped_and_told():
    view = hand_made(WIDE, (100, 80), (10, 20, 110, 100))
    points = np.array([[10, 20], [109.4, 99.4], [9.4, 50], [110, 50], [50, 100]])
    pixels, inside = cam.project_points(view, points)
    assert inside.tolist() == [True, True, False, False, False]
    assert pixels.tolist() == [[0, 0], [99, 79], [0, 30], [99, 30], [40, 79]]
    mirrored, inside = cam.project_points(hand_made(WIDE, (100, 80), (10, 20, 110, 100), flipped=True), points)
    assert inside.tolist() == [True, True, False, False, False]
    assert mirrored.tolist() == [[99, 0], [0, 79], [99, 30], [0, 30], [59, 79]]


# --- depth kinds --------------------------------------------------------------------------------------------------


def test_ray_factor_of_a_right_triangle():
    camera = cam.Camera(100.0, 200.0, 50.0, 50.0, 200, 300)
    points = np.array([[50, 50], [125, 50], [50, 200]])  # straight ahead; 3-4-5 triangles to the right and down
    assert cam.z_to_ray_factor(camera, points).tolist() == [1.0, 1.25, 1.25]
    assert cam.convert_depth(camera, points, [2, 4, 4], "z", "ray").tolist() == [2, 5, 5]
    assert cam.convert_depth(camera, points, [2, 5, 5], "ray", "z").tolist() == [2, 4, 4]


def test_depth_conversion_is_lossless():
    rng = np.random.default_rng(0)
    points, depth_m = rng.uniform(0, 640, (1000, 2)), rng.uniform(0.1, 100, 1000)
    there = cam.convert_depth(CORRIDOR, points, depth_m, "z", "ray")
    assert np.all(there >= depth_m)
    np.testing.assert_allclose(cam.convert_depth(CORRIDOR, points, there, "ray", "z"), depth_m, rtol=1e-14)
    assert np.array_equal(cam.convert_depth(CORRIDOR, points, depth_m, "z", "z"), depth_m)


def test_ray_factor_does_not_change_with_the_view():
    for view in training_views(WIDE, 5):
        left, top, right, bottom = view.box
        points = np.array([[left, top], [right - 1, top], [left + 37.5, bottom - 1]])
        scale = np.array([view.camera.width / (right - left), view.camera.height / (bottom - top)])
        moved = (points + 0.5 - (left, top)) * scale - 0.5
        np.testing.assert_allclose(cam.z_to_ray_factor(view.camera, moved), cam.z_to_ray_factor(WIDE, points))


POINTS, DEPTH_M = np.array([[50, 50], [125, 50], [50, 200]]), np.array([2.0, 4.0, 8.0])
TRIANGLES = cam.Camera(100.0, 200.0, 50.0, 50.0, 200, 300)  # slopes (0, 0), (3/4, 0), (0, 3/4)


@pytest.mark.parametrize(
    "dataset, from_kind, expected",
    [
        ("argoverse2", "z", [2, 5, 10]), ("waymo", "z", [2, 5, 10]), ("nuscenes", "z", [2, 4, 8]),
        ("nuscenes", "ray", [2, 3.2, 6.4]), ("ddad", "z", [2, 4, 8]), ("matterport3d", "z", [2, 5, 10]),
        ("eth3d", "z", [2, 5, 10]), ("sunrgbd", "z", [1.6, 4, 8]), ("nyuv2", "z", [1.6, 4, 8]),
        ("ibims1", "z", [2, 4, 8]), ("taskonomy", "ray", [2, 4, 8]), ("my_rooms", "z", [2, 4, 8]),
        ("scannetpp", "z", [2, math.hypot(0.75, 4), math.hypot(0.75, 8)]),
        ("scannetpp", "ray", [2, math.hypot(0.75, 3.2), math.hypot(0.75, 6.4)]),
    ],
)  # fmt: skip
def test_official_labels_are_those_of_the_release(dataset, from_kind, expected):
    given = dataset, TRIANGLES, POINTS, DEPTH_M, from_kind
    np.testing.assert_allclose(cam.label_depth(*given, "official"), expected, rtol=1e-14)
    for kind in ("z", "ray"):
        assert np.array_equal(
            cam.label_depth(*given, kind), cam.convert_depth(TRIANGLES, POINTS, DEPTH_M, from_kind, kind)
        )


def test_points_in_the_cameras_frame():
    assert cam.points_in_camera(TRIANGLES, POINTS, DEPTH_M).tolist() == [[0, 0, 2], [3, 0, 4], [0, 6, 8]]
    assert cam.viewing_ray(TRIANGLES, 125, 50).tolist() == pytest.approx([0.6, 0, 0.8], abs=1e-15)
    assert cam.viewing_ray(TRIANGLES, -25.0, 50).tolist() == pytest.approx([-0.6, 0, 0.8], abs=1e-15)


# --- the processor's resize ---------------------------------------------------------------------------------------


def test_processor_size_is_that_of_hugging_face():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(10, 2000, (2000, 2)).tolist():
        for limits in [(3136, 12845056), (200704, 1003520)]:
            assert cam.processor_size(height, width, GRID, *limits, 0) == smart_resize(height, width, GRID, *limits)


def test_snap_to_grid_of_the_official_image():
    snapped = cam.snap_to_grid(np.full((643, 857, 3), 7, np.uint8), GRID, 3136, 12845056, 0)
    assert snapped.shape == (644, 868, 3) and np.all(snapped == 7)  # 31×23 tokens
    on_grid = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    assert np.array_equal(cam.snap_to_grid(on_grid, GRID, 3136, 12845056, 0), on_grid)


@pytest.mark.parametrize("longest_px, grid", [(1024, 16), (1540, 14), (200, 8)])
def test_processor_size_is_that_of_pixtral(longest_px, grid):
    """Sides are rounded up to the grid, after the longer one was shrunk to the limit."""
    assert cam.processor_size(643, 857, 16, 256, 1024**2, 1024) == (656, 864)  # 41 × 54 patches
    sizes = np.random.default_rng(longest_px).integers(10, 2000, (2000, 2)).tolist()
    assert max(map(max, sizes)) > longest_px > min(map(max, sizes))
    for height, width in [*sizes, (longest_px, longest_px), (longest_px + 1, grid), (grid, longest_px)]:
        expected = get_resize_output_image_size(np.zeros((height, width, 0)), longest_px, grid, "channels_last")
        found = cam.processor_size(height, width, grid, grid**2, longest_px**2, longest_px)
        assert found == expected, (height, width)


def test_snap_to_grid_is_pixtrals_resize():
    image = np.random.default_rng(0).integers(0, 256, (67, 121, 3), np.uint8)
    for longest_px in (64, 1024):
        resize = PixtralImageProcessorPil(size={"longest_edge": longest_px}, do_rescale=False, do_normalize=False)
        expected = resize([image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert np.array_equal(cam.snap_to_grid(image, 16, 256, longest_px**2, longest_px), expected)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("fx, fy", [(0.0, 500.0), (500.0, -1.0), (math.nan, 500.0), (500.0, math.inf)])
def test_focal_length_must_be_positive(mode, fx, fy):
    with pytest.raises(InputError, match=f"fx={fx}, fy={fy} px"):
        cam.plan_view(cam.Camera(fx, fy, 1, 1, 9, 9), Geometry(mode=mode), GRID, None)


def test_image_of_another_size_than_its_intrinsics():
    view = cam.plan_view(CORRIDOR, Geometry(), GRID, None)
    with pytest.raises(InputError, match="480x640 px(.|\n)*640x480 px"):
        cam.apply_view(view, BLANK.transpose(1, 0, 2))
    half = cam.plan_view(cam.Camera(2000.0, 2000.0, 1, 1, 641, 480), Geometry(), GRID, None)
    assert half.reduction == 2 and cam.apply_view(half, np.zeros((240, 321, 3), np.uint8), 2).shape == (252, 308, 3)
    with pytest.raises(InputError, match="320x240 px(.|\n)*321x240 px"):
        cam.apply_view(half, BLANK[::2, ::2], 2)


def test_pixel_limits_name_both_sizes():
    view = cam.plan_view(CORRIDOR, Geometry(), GRID, None)
    cam.check_pixels(view, 3136, 1148 * 868, 0)
    for limits in [(3136, 1148 * 868 - 1), (1148 * 868 + 1, 12845056)]:
        with pytest.raises(InputError, match=f"1148x868 = 996464 px, from 640x480 px(.|\n)*{limits[0]} to {limits[1]}"):
            cam.check_pixels(view, *limits, 0)


def test_unknown_depth_kind():
    with pytest.raises(InputError, match="'z' to 'disparity'"):
        cam.convert_depth(CORRIDOR, [[1, 1]], [1.0], "z", "disparity")


def test_too_narrow_for_the_processor():
    with pytest.raises(InputError, match="2010x10 px"):
        cam.processor_size(10, 2010, GRID, 3136, 12845056, 0)


def test_record_of_the_release_gives_the_golden_depths():
    if not IBIMS.exists():
        pytest.skip(f"{IBIMS} is absent")
    with open(IBIMS / "ibims1_subset.jsonl") as file:
        record = json.loads(file.readline())
    assert cam.Camera(*record["intrinsics"]) == CORRIDOR
    for index, raw, depth_m in [(81, [618, 74], 1.682307), (0, [519, 129], 2.417792), (1, [45, 56], 2.293431)]:
        assert record["pixel_coords"][index] == raw and round(record["depth"][index], 6) == depth_m
