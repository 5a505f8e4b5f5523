import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
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


def training_views(camera, count=50, **geometry):
    rng = np.random.default_rng(0)
    return [cam.plan_view(camera, Geometry(**geometry), GRID, rng) for _ in range(count)]


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
    view = cam.plan_view(STREET, Geometry(mode="official"), GRID, random.Random(3))
    expected = random.Random(3)
    height, width = int(min(710, expected.uniform(700, 1200))), int(min(1263, expected.uniform(1000, 1400)))
    assert view.resized == (1263, 710)
    assert (view.camera.width, view.camera.height) == (width, height)
    assert view.corner == ((1263 - width) // 2, (710 - height) // 2)
    assert view.camera.cx == pytest.approx(816.3 * 1000 / 1266.4 - view.corner[0])


def test_official_crop_is_the_middle_of_the_resized_image():
    image = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)
    view = cam.plan_view(WIDE, Geometry(mode="official"), GRID, random.Random(0))
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
    assert len({view.camera.width for view in views}) > 5 and len({view.camera.height for view in views}) > 5
    assert np.std([view.camera.cx for view in views]) > 100  # principal-point diversity


def test_centred_crops_keep_the_middle_in_the_middle():
    for view in training_views(WIDE, crop_position="centred"):
        left, top, right, bottom = view.box
        assert (left + right, top + bottom) == pytest.approx((WIDE.width, WIDE.height))


def test_axis_shorter_than_the_drawn_size_is_kept_whole():
    for view in training_views(CORRIDOR, crop_width=(1000, 1100), crop_height=(900, 1200)):
        assert view.box[1::2] == (0.0, 480.0) and view.camera.height == 868  # 860 px at f = 1000
        assert view.box[2] - view.box[0] < 640 and view.camera.fx == pytest.approx(1000)


def test_image_smaller_than_the_grid_becomes_one_cell():
    tiny = cam.Camera(1000.0, 1000.0, 5.0, 4.0, 10, 9)
    seen = cam.plan_view(tiny, Geometry(crop_width=(1, 5), crop_height=(1, 5)), GRID, np.random.default_rng(0)).camera
    assert (seen.width, seen.height) == (GRID, GRID)


def test_box_never_leaves_the_image_when_the_crop_is_just_as_large():
    for focal in np.random.default_rng(0).uniform(100, 3000, 500):
        camera = cam.Camera(focal, focal, 320.0, 240.0, 640, 480)
        exact = (math.floor(640 * (1000 / focal)),) * 2
        geometry = Geometry(crop_width=exact, crop_height=exact)
        box = cam.plan_view(camera, geometry, 1, np.random.default_rng(1)).box
        assert 0 <= box[0] < box[2] <= 640 and 0 <= box[1] < box[3] <= 480


def test_view_is_a_function_of_the_seed():
    first, second = (cam.plan_view(WIDE, Geometry(), GRID, np.random.default_rng(seed)) for seed in (1, 1))
    assert first == second != cam.plan_view(WIDE, Geometry(), GRID, np.random.default_rng(2))


# --- corrected: pixels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_pixels_lie_where_the_convention_says(seed):
    """On a ramp each value names its source coordinate, so the image itself tells where it was sampled."""
    source = cam.Camera(119.3, 131.7, 100.0, 90.0, 250, 200)  # no simple ratio: rounding to uint8 averages out
    ramp_y, ramp_x = np.mgrid[0:200, 0:250]
    image = np.stack([ramp_x, ramp_y, 0 * ramp_x], -1).astype(np.uint8)
    geometry = Geometry(focal_px=300.0, crop_width=(300, 500), crop_height=(300, 400))
    view = cam.plan_view(source, geometry, GRID, None if seed is None else np.random.default_rng(seed))
    seen, result = view.camera, cam.apply_view(view, image).astype(float)
    assert result.shape == (seen.height, seen.width, 3)
    y, x = np.mgrid[0 : seen.height, 0 : seen.width]
    off_x = result[..., 0] - ((x - seen.cx) / seen.fx * source.fx + source.cx)  # same ray, by the intrinsics alone
    off_y = result[..., 1] - ((y - seen.cy) / seen.fy * source.fy + source.cy)
    inner = np.s_[10:-10, 10:-10]  # the filter is cut at the border of the source
    assert abs(off_x[inner].mean()) < 0.02 and abs(off_y[inner].mean()) < 0.02
    assert np.abs(off_x[inner]).max() < 1.1 and np.abs(off_y[inner]).max() < 1.1  # uint8, rounded after each axis


def test_box_resize_is_the_crop_of_the_whole_resize():
    image = np.random.default_rng(0).integers(90, 160, (480, 640, 3), np.uint8)
    source = cam.Camera(500.0, 500.0, 320.0, 240.0, 640, 480)  # scale 2: a box at whole px stays on the same phase
    view = cam.View(source, cam.Camera(1000, 1000, 0, 0, 560, 280), (100, 50, 380, 190), (560, 280), (0, 0), False)
    whole = np.asarray(Image.fromarray(image).resize((1280, 960), Image.Resampling.BICUBIC))
    difference = cam.apply_view(view, image).astype(int) - whole[100:380, 200:760]
    assert np.abs(difference).max() <= 2  # Pillow may take the axes in another order, and rounds after each


@pytest.mark.parametrize("camera", [CORRIDOR, STREET, WIDE])
@pytest.mark.parametrize("train", [False, True])
def test_projected_points_keep_their_ray_to_half_a_pixel_without_bias(camera, train):
    points = np.random.default_rng(1).uniform(0, 1, (5000, 2)) * (camera.width, camera.height) - 0.5
    view = cam.plan_view(camera, Geometry(), GRID, np.random.default_rng(2) if train else None)
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
    view = cam.View(WIDE, cam.Camera(600, 620, 0, 0, 100, 80), (10, 20, 110, 100), (100, 80), (0, 0), False)
    points = np.array([[10, 20], [109.4, 99.4], [9.4, 50], [110, 50], [50, 100]])
    pixels, inside = cam.project_points(view, points)
    assert inside.tolist() == [True, True, False, False, False]
    assert pixels.tolist() == [[0, 0], [99, 79], [0, 30], [99, 30], [40, 79]]


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


# --- the processor's resize ---------------------------------------------------------------------------------------


def test_smart_size_is_that_of_hugging_face():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(10, 2000, (2000, 2)).tolist():
        for limits in [(3136, 12845056), (200704, 1003520)]:
            assert cam.smart_size(height, width, GRID, *limits) == smart_resize(height, width, GRID, *limits)


def test_snap_to_grid_of_the_official_image():
    snapped = cam.snap_to_grid(np.full((643, 857, 3), 7, np.uint8), GRID, 3136, 12845056)
    assert snapped.shape == (644, 868, 3) and np.all(snapped == 7)  # 31×23 tokens
    on_grid = np.random.default_rng(0).integers(0, 256, (56, 84, 3), np.uint8)
    assert np.array_equal(cam.snap_to_grid(on_grid, GRID, 3136, 12845056), on_grid)


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


def test_pixel_limits_name_both_sizes():
    view = cam.plan_view(CORRIDOR, Geometry(), GRID, None)
    cam.check_pixels(view, 3136, 1148 * 868)
    for limits in [(3136, 1148 * 868 - 1), (1148 * 868 + 1, 12845056)]:
        with pytest.raises(InputError, match=f"1148x868 = 996464 px, from 640x480 px(.|\n)*{limits[0]} to {limits[1]}"):
            cam.check_pixels(view, *limits)


def test_unknown_depth_kind():
    with pytest.raises(InputError, match="'z' to 'disparity'"):
        cam.convert_depth(CORRIDOR, [[1, 1]], [1.0], "z", "disparity")


def test_too_narrow_for_the_processor():
    with pytest.raises(InputError, match="2010x10 px"):
        cam.smart_size(10, 2010, GRID, 3136, 12845056)


def test_record_of_the_release_gives_the_golden_depths():
    if not IBIMS.exists():
        pytest.skip(f"{IBIMS} is absent")
    with open(IBIMS / "ibims1_subset.jsonl") as file:
        record = json.loads(file.readline())
    assert cam.Camera(*record["intrinsics"]) == CORRIDOR
    for index, raw, depth_m in [(81, [618, 74], 1.682307), (0, [519, 129], 2.417792), (1, [45, 56], 2.293431)]:
        assert record["pixel_coords"][index] == raw and round(record["depth"][index], 6) == depth_m
