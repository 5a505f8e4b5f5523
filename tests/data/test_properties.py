"""What holds for every camera, geometry and chance."""

import io

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from depthlm_jax.config import Geometry
from depthlm_jax.data import camera as cam
from depthlm_jax.data import images
from depthlm_jax.data.depth_record import DepthRecord

REPEATABLE = settings(derandomize=True, deadline=None, max_examples=150)
FEWER = settings(REPEATABLE, max_examples=60)

SHARE = st.floats(0, 1, exclude_max=True)
CHANCE = st.builds(cam.Chance, *[SHARE] * 6)
JITTER = st.sampled_from([(1.0, 1.0), (1.0, 1.3), (0.8, 1.1), (1.2, 1.2)])
LENGTH = st.integers(1, 3000)
FOCAL = st.floats(20, 5000)
GRID = st.sampled_from([1, 4, 16, 28])


def ranges(largest):
    ends = st.tuples(st.integers(0, largest), st.integers(0, largest)).map(sorted).map(tuple)
    return st.one_of(st.just((0, 0)), ends.filter(lambda ends: ends[0] > 0))


@st.composite
def cameras(draw):
    width, height = draw(LENGTH), draw(LENGTH)
    centre = st.floats(-0.5, 1.5)
    return cam.Camera(draw(FOCAL), draw(FOCAL), draw(centre) * width, draw(centre) * height, width, height)


GEOMETRY = st.builds(
    Geometry,
    mode=st.sampled_from(["corrected", "official"]),
    focal_px=st.one_of(st.just(0.0), st.floats(100, 2000)),
    crop_width=ranges(1500),
    crop_height=ranges(1500),
    crop_position=st.sampled_from(["random", "centred"]),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
)


@st.composite
def views(draw):
    chance = draw(st.one_of(st.none(), CHANCE))
    view = cam.plan_view(draw(cameras()), draw(GEOMETRY), draw(GRID), chance, draw(JITTER))
    assume(min(view.resized) > 0)  # official: no pixel is left of a small image
    return view


def points_of(view, count=50):
    size = view.source.width, view.source.height
    return np.random.default_rng(0).uniform(0, 1, (count, 2)) * size - 0.5


@FEWER
@given(GEOMETRY, GRID, JITTER, st.integers(0, 2**32), st.booleans())
def test_sizes_of_many_records_are_those_of_their_views(geometry, grid, jitter, seed, train):
    rng = np.random.default_rng(seed)
    width_N, height_N = rng.integers(1, 3000, (2, 100))
    fx_N, fy_N = np.exp(rng.uniform(np.log(20), np.log(8000), (2, 100)))
    fx_N[::3] = 500.0  # whole ratios, where rounding could differ
    chance_N6 = rng.random((100, 6)) if train else None
    sizes = cam.view_size(width_N, height_N, fx_N, fy_N, geometry, grid, chance_N6, jitter)
    for n, (width, height) in enumerate(zip(*sizes, strict=True)):
        source = cam.Camera(float(fx_N[n]), float(fy_N[n]), 1.0, 1.0, int(width_N[n]), int(height_N[n]))
        view = cam.plan_view(source, geometry, grid, cam.Chance(*chance_N6[n]) if train else None, jitter)
        assert (view.camera.width, view.camera.height) == (width, height)


@REPEATABLE
@given(views())
def test_view_lies_in_the_image(view):
    left, top, right, bottom = view.box
    assert 0 <= left < right <= view.source.width and 0 <= top < bottom <= view.source.height
    assert left % view.reduction == top % view.reduction == 0
    scale = max(view.resized[0] / (right - left), view.resized[1] / (bottom - top))
    assert view.reduction == 1 or view.reduction * scale <= cam.LOST_DETAIL  # never decoded much smaller than shown


@REPEATABLE
@given(views())
def test_unproject_undoes_project(view):
    points = points_of(view)
    back = cam.unproject(view, cam.project(view, points))
    np.testing.assert_allclose(back, points, atol=1e-6, rtol=0)


@REPEATABLE
@given(views())
def test_a_3d_point_keeps_its_pixel(view):
    """Unify, crop, flip and jitter: what the result's camera sees of a 3D point is where its pixel went."""
    points = points_of(view)
    z_m = np.random.default_rng(1).uniform(0.2, 200, len(points))
    x_m, y_m, z_m = cam.points_in_camera(view.source, points, z_m).T
    seen, mirror = view.camera, -1 if view.flipped else 1
    exact = np.stack([mirror * x_m / z_m * seen.fx + seen.cx, y_m / z_m * seen.fy + seen.cy], axis=-1)
    np.testing.assert_allclose(cam.project(view, points), exact, atol=1e-6)
    pixels, inside = cam.project_points(view, points)
    assert np.abs(pixels - exact)[inside].max(initial=0) <= (1 if view.official else 0.5) + 1e-6
    clear = np.all((exact > 0.51) & (exact < np.array([seen.width, seen.height]) - 1.51), axis=1)
    assert inside[clear].all()


@REPEATABLE
@given(views(), st.sampled_from(["z", "ray"]))
def test_distances_are_the_same_in_every_view(view, kind):
    points = points_of(view)
    z_m = np.random.default_rng(1).uniform(0.2, 200, len(points))
    label_m = cam.label_depth("d", view.source, points, z_m, "z", kind)
    moved = cam.points_in_camera(view.camera, cam.project(view, points), z_m)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1) if kind == "ray" else moved[:, 2], label_m, rtol=1e-6)


@REPEATABLE
@given(cameras(), st.floats(1e-2, 1e4))
def test_ray_and_z_are_inverse(camera, depth_m):
    points = np.random.default_rng(0).uniform(0, 1, (20, 2)) * (camera.width, camera.height)
    ray_m = cam.convert_depth(camera, points, np.full(20, depth_m), "z", "ray")
    np.testing.assert_allclose(cam.convert_depth(camera, points, ray_m, "ray", "z"), depth_m, rtol=1e-12)
    for (x, y), metres in zip(points, ray_m, strict=True):
        np.testing.assert_allclose(
            cam.viewing_ray(camera, x, y) * metres, cam.points_in_camera(camera, [(x, y)], [depth_m])[0], rtol=1e-9
        )


@st.composite
def photographs(draw):
    """Returns a source of a few hundred px, a view that keeps at least an eighth of its resolution, and a spot."""
    width, height = draw(st.integers(200, 400)), draw(st.integers(200, 400))
    source = cam.Camera(draw(st.floats(400, 600)), draw(st.floats(400, 600)), width / 2, height / 2, width, height)
    geometry = Geometry(
        focal_px=draw(st.floats(70, 1200)), flip=draw(st.sampled_from([0.0, 1.0])),
        crop_width=draw(ranges(300)), crop_height=draw(ranges(300)),
    )  # fmt: skip
    return (
        cam.plan_view(source, geometry, draw(st.sampled_from([4, 28])), draw(CHANCE), draw(JITTER)),
        draw(SHARE),
        draw(SHARE),
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@FEWER
@given(photographs())
def test_what_is_painted_at_a_point_is_seen_at_its_pixel(kind, photograph):
    view, share_x, share_y = photograph
    left, top, right, bottom = view.box
    spread = 4 * max(1.0, (right - left) / view.resized[0], (bottom - top) / view.resized[1])  # source px
    assume(min(right - left, bottom - top) > 9 * spread)
    x = left + 4 * spread + share_x * (right - left - 8 * spread)
    y = top + 4 * spread + share_y * (bottom - top - 8 * spread)
    rows, columns = np.mgrid[0 : view.source.height, 0 : view.source.width]
    spot = 20 + 200 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * spread**2))
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(spot[..., None], 3, 2).round().astype(np.uint8)).save(
        buffer, kind, **({"quality": 98} if kind == "JPEG" else {})
    )
    record = DepthRecord("d:1", buffer.getvalue(), np.ones(4), np.array([[x, y]]), np.ones(1), "z", "d", None)
    opened = images.open_image(record)
    shown = images.render(opened, view)[..., 1].astype(float)
    weight = np.clip(shown - 60, 0, None)
    rows, columns = np.mgrid[0 : shown.shape[0], 0 : shown.shape[1]]
    centre = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
    assert np.abs(centre - cam.project(view, [(x, y)])[0]).max() < 0.3
    pixels, inside = cam.project_points(view, [(x, y)])
    assert inside.all() and np.abs(centre - pixels[0]).max() <= 1
