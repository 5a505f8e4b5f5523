import subprocess
import sys

import numpy as np
import pytest

from depthlm_jax.config import Source
from depthlm_jax.data import images, records, synthetic


@pytest.fixture(scope="module")
def scenes():
    return [synthetic.render(synthetic.scene_seed(0, number)) for number in range(150)]


def empty_room(low, high) -> synthetic.Solid:
    return synthetic.Solid("room", np.zeros(3), 0.0, np.array(low), np.array(high), np.ones(3))


def test_floor_depth_is_the_analytic_one():
    camera, height_m, pitch = synthetic.CAMERAS[3], 1.3, 0.25
    fx, fy, cx, cy, width, height = camera
    rays_3R = synthetic.cast_rays(camera, yaw=0.4, pitch=pitch, roll=0.0)
    depth_HW = synthetic.first_hit(empty_room([-np.inf] * 3, [np.inf, height_m, np.inf]), rays_3R).reshape(192, 224)
    down_H1 = (np.arange(height)[:, None] - cy) / fy * np.cos(pitch) + np.sin(pitch)  # Y of a ray of unit z-depth
    expected_HW = np.where(down_H1 > 0, height_m / down_H1, np.inf) * np.ones(int(width))
    np.testing.assert_allclose(depth_HW, expected_HW, rtol=1e-12)


def test_depth_is_along_the_principal_axis_not_along_the_ray():
    camera = synthetic.CAMERAS[1]
    rays_3R = synthetic.cast_rays(camera, yaw=0.0, pitch=0.0, roll=0.03)
    wall_R = synthetic.first_hit(empty_room([-99.0] * 3, [99.0, 99.0, 4.5]), rays_3R)
    np.testing.assert_allclose(wall_R, 4.5, rtol=1e-12)


@pytest.mark.parametrize("kind", ["box", "ball"])
def test_hits_lie_on_the_solid_and_on_its_near_side(kind):
    half_m = np.array([0.5, 0.5, 0.5])
    solid = synthetic.Solid(kind, np.array([0.3, 0.2, 3.0]), 0.7, -half_m, half_m, np.ones(3))
    rays_3R = synthetic.cast_rays(synthetic.CAMERAS[0], yaw=0.05, pitch=0.02, roll=0.01)
    depth_R = synthetic.first_hit(solid, rays_3R)
    hit = np.isfinite(depth_R)
    own_3M = synthetic.to_own_axes(solid, rays_3R[:, hit] * depth_R[hit])
    size_M = np.abs(own_3M).max(axis=0) if kind == "box" else np.linalg.norm(own_3M, axis=0)
    np.testing.assert_allclose(size_M, 0.5, rtol=1e-9)
    normal_3M, _ = synthetic.own_normal(solid, own_3M)
    assert hit.sum() > 400
    assert ((synthetic.yaw_matrix(0.7) @ normal_3M * rays_3R[:, hit]).sum(axis=0) <= 0).all()


def test_a_seed_fixes_the_scene(scenes):
    again = synthetic.render(synthetic.scene_seed(0, 7))
    for name in ("image_HW3", "depth_HW", "intrinsics", "pixel_coords", "depth_m"):
        np.testing.assert_array_equal(vars(again)[name], vars(scenes[7])[name])
    assert not np.array_equal(again.depth_m, scenes[8].depth_m)


def test_splits_share_no_scene(scenes):
    train = {scene.image_HW3.tobytes() for scene in scenes}
    validation = {synthetic.render(synthetic.scene_seed(1, number)).image_HW3.tobytes() for number in range(50)}
    assert len(train) == 150 and len(validation) == 50
    assert not train & validation


def test_cameras_differ_and_come_out_alike_after_unifying_the_focal_length(scenes):
    fx, fy, cx, cy, width, height = synthetic.CAMERAS.T
    assert len({*fx}) >= 4 and len({*zip(width, height, strict=True)}) >= 4
    assert (fx != fy).any() and (np.abs(cx - (width - 1) / 2) > 3).any() and (np.abs(cy - (height - 1) / 2) > 3).any()
    unified_px = np.stack([100 * width / fx, 100 * height / fy])
    assert unified_px.min() >= 95 and unified_px.max() <= 128
    seen = {(*scene.intrinsics, *scene.depth_HW.shape[::-1]) for scene in scenes}
    assert seen == {tuple(camera) for camera in synthetic.CAMERAS}


def test_nothing_looks_like_the_red_marker(scenes):
    for scene in scenes:
        from_red = np.abs(scene.image_HW3.astype(int) - [255, 0, 0]).max(axis=-1)
        assert from_red.min() > 80


def test_haze_moves_each_channel_steadily_and_by_a_visible_step_for_each_quarter_of_the_distance():
    depth_M = np.geomspace(*synthetic.DEPTH_RANGE_M, 18)  # steps of 1.25
    steps_3M = np.diff(synthetic.haze(np.tile(synthetic.SURFACE_RGB[:, None], 18), depth_M), axis=1)
    assert (np.sign(steps_3M) == np.sign(synthetic.HAZE_RGB - synthetic.SURFACE_RGB)[:, None]).all()
    assert np.abs(steps_3M).sum(axis=0).min() > 8


def test_colour_near_a_point_tells_its_depth(scenes):
    colours, log_depths = [], []
    for scene in scenes:
        for (x, y), depth_m in zip(scene.pixel_coords.astype(int), scene.depth_m, strict=True):
            colours.append(scene.image_HW3[y - 4 : y + 5, x - 4 : x + 5].reshape(-1, 3).mean(axis=0))
            log_depths.append(np.log(depth_m))
    colours, log_depths = np.array(colours), np.array(log_depths)
    known = np.arange(len(colours)) < 1600
    distances = np.linalg.norm(colours[~known][:, None] - colours[known][None], axis=-1)
    guess = np.median(log_depths[known][np.argsort(distances, axis=1)[:, :9]], axis=1)
    assert (np.abs(guess - log_depths[~known]) < np.log(1.25)).mean() > 0.8


def test_labels_are_exact_spread_and_off_the_border_and_edges(scenes):
    for scene in scenes:
        x, y = scene.pixel_coords.astype(int).T
        height, width = scene.depth_HW.shape
        margin = 6 * width / 112
        assert len(scene.depth_m) == 16 == len({*zip(x, y, strict=True)})
        assert min(x.min(), y.min()) >= margin and x.max() < width - margin and y.max() < height - margin
        np.testing.assert_array_equal(scene.depth_m, scene.depth_HW[y, x])
    depth_m = np.concatenate([scene.depth_m for scene in scenes])
    assert synthetic.DEPTH_RANGE_M[0] <= depth_m.min() < 0.9 and 25 < depth_m.max() <= synthetic.DEPTH_RANGE_M[1]
    constants = np.geomspace(*synthetic.DEPTH_RANGE_M, 300)[:, None]
    best = (np.maximum(constants / depth_m, depth_m / constants) < 1.25).mean(axis=1).max()
    assert 0.1 < best <= 0.25


def test_one_surface_keeps_clear_of_edges():
    surface_HW = np.zeros((20, 20), int)
    surface_HW[:, 10:] = 1
    assert np.flatnonzero(~synthetic.one_surface(surface_HW)[5]).tolist() == [7, 8, 9, 10, 11, 12]


def test_what_is_read_back_is_what_was_rendered(tmp_path):
    calls = []
    folder = synthetic.build(tmp_path, 5, 2, lambda done, total: calls.append((done, total)))
    assert calls == [(n, 7) for n in range(1, 8)]
    for split_number, (split, count) in enumerate((("train", 5), ("validation", 2))):
        opened = records.open_source(Source(path=str(folder), split=split))
        rendered = [synthetic.render(synthetic.scene_seed(split_number, number)) for number in range(count)]
        by_image = {scene.image_HW3.tobytes(): scene for scene in rendered}
        assert {images.decode_image(record).tobytes() for record in opened} == by_image.keys()
        for record in opened:
            scene = by_image[images.decode_image(record).tobytes()]
            np.testing.assert_array_equal(record.intrinsics, scene.intrinsics)
            np.testing.assert_array_equal(record.pixel_coords, scene.pixel_coords)
            np.testing.assert_array_equal(record.depth_m, scene.depth_m.astype(np.float32))
            assert (record.depth_kind, record.dataset) == ("z", "synthetic_depth")
            assert record.size == scene.depth_HW.shape[::-1]


def contents(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_building_twice_does_nothing_and_other_counts_are_another_copy(tmp_path):
    calls = []
    folder = synthetic.build(tmp_path, 3, 1)
    before = contents(folder)
    assert synthetic.build(tmp_path, 3, 1, lambda done, total: calls.append(done)) == folder
    assert calls == []
    assert synthetic.build(tmp_path, 2, 1) != folder
    assert contents(folder) == before


def test_a_copy_that_another_process_finished_first_is_taken(tmp_path):
    finished = []
    folder = synthetic.build(tmp_path, 2, 1, lambda *_: finished or finished.append(synthetic.build(tmp_path, 2, 1)))
    assert finished == [folder]
    assert len(records.open_source(Source(path=str(folder)))) == 2
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]  # no unfinished folder stays


def test_neither_tensorflow_nor_jax_is_imported(tmp_path):
    code = (
        "import sys; from depthlm_jax.data import images, records, synthetic; from depthlm_jax.config import Source;"
        f"records.open_source(Source(path=str(synthetic.build({str(tmp_path)!r}, 1, 1))))[0];"
        "sys.exit(' '.join({'tensorflow', 'jax', 'flax', 'torch'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["near", "far"])
def test_a_world_has_its_own_cameras_and_distances(name):
    world = synthetic.WORLDS[name]
    made = [synthetic.render(synthetic.scene_seed(0, number), world) for number in range(40)]
    depth_m = np.concatenate([scene.depth_m for scene in made])
    low, high = world.label_m
    assert depth_m.min() >= low and depth_m.max() <= high and np.ptp(np.log(depth_m)) > 0.8 * np.log(high / low)
    assert {scene.intrinsics[0] for scene in made} == {synthetic.CAMERAS[row][0] for row in world.cameras}


def test_near_and_far_have_no_camera_and_no_distance_in_common():
    near, far = synthetic.WORLDS["near"], synthetic.WORLDS["far"]
    assert not {*near.cameras} & {*far.cameras} and near.label_m[1] < far.label_m[0]
    assert synthetic.CAMERAS[[*near.cameras], 0].max() < synthetic.CAMERAS[[*far.cameras], 0].min()


def test_worlds_lie_beside_one_another(tmp_path):
    folders = [synthetic.build(tmp_path, 2, 1, world=name) for name in ("wide", "near", "far")]
    assert [folder.parents[1].name for folder in folders] == ["2_1", "near_2_1", "far_2_1"]
    depths = [records.open_source(Source(path=str(folder)))[0].depth_m for folder in folders]
    assert depths[1].max() < depths[2].min()
