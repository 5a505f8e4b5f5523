"""Rendered metric scenes seen by several cameras: the data set that comes with the package.

Rooms, halls and open ground with boxes and balls on a tiled floor, cast ray by ray, so that every depth is exact. The
air is thick: colour moves from the surface's towards the haze's by a fixed law of metres, which a tiny model can read
off one patch. Perspective, tiles of fixed metres and shadows are there too. Nothing is red: red is the marker.

World frame in metres, camera at the origin: X right, Y down, Z forward, so the floor is at Y = camera height.
"""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from depthlm_jax.data import writer

DATASET = "synthetic_depth"
VERSION = "1.0.0"  # raise when `render` changes, so that old copies are not taken for new ones
SPLITS = ("train", "validation")
SHARDS = 8  # files of a split that several processes write
ONE_PROCESS_SCENES = 256  # so few are rendered before a process has started
SEED = 2026  # first number of each scene's seed
POINTS = 16  # labelled pixels of a scene
DEPTH_RANGE_M = (0.7, 30.0)  # of the labels
MARGIN_PX = 7.0  # of a label from the border, in the image as it is once its focal length is 100 px
EDGE_PX = 3  # no other surface within this distance of a label

CAMERAS = np.array(  # fx, fy, cx, cy, W, H; about 96-118 px wide and high at a focal length of 100 px
    [
        [140.0, 140.0, 79.5, 71.5, 160, 144],
        [165.0, 163.0, 97.0, 78.0, 192, 160],
        [118.0, 118.0, 63.5, 63.5, 128, 128],
        [190.0, 192.0, 118.0, 90.0, 224, 192],
        [150.0, 150.0, 70.0, 92.0, 144, 176],
        [178.0, 176.0, 99.5, 95.0, 200, 200],
    ]
)



@dataclasses.dataclass(frozen=True)
class World:
    """What differs between the worlds that scenes are drawn from; ranges of which each ratio is equally likely."""

    cameras: tuple[int, ...]  # rows of CAMERAS
    camera_height_m: tuple[float, float]
    open_ground: float  # share of scenes without walls
    wall_m: tuple[float, float]  # distance of the wall ahead
    nearest_m: float  # of the objects
    label_m: tuple[float, float]  # of the labels


WORLDS = {
    "wide": World((0, 1, 2, 3, 4, 5), (0.35, 1.9), 0.4, (3.0, 30.0), 1.0, DEPTH_RANGE_M),
    "near": World((0, 2, 4), (0.35, 1.0), 0.0, (2.0, 5.0), 1.0, (0.7, 4.0)),  # wide angles, small rooms
    "far": World((1, 3, 5), (1.0, 2.5), 0.5, (12.0, 30.0), 5.0, (5.0, 30.0)),  # long lenses, halls, open ground
}

# Sand nearby, lavender in the middle, blue far away. One channel after the other gives way to the haze: blue within
# 2 m, green within 6 m, red within 17 m, so that the colour keeps changing over the whole range of distances.
HAZE_LENGTH_M = np.array([17.0, 5.5, 1.7])
HAZE_RGB = np.array([85.0, 140.0, 240.0])
SURFACE_RGB = np.array([250.0, 222.0, 120.0])
TILE_M = {"room": 0.5, "box": 0.25, "ball": np.inf}  # side of a tile; inf: plain
LIGHT = np.array([-0.45, -0.8, -0.4]) / np.linalg.norm([-0.45, -0.8, -0.4])  # towards the lamp


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """One rendered picture and its labels; an integer pixel coordinate is a pixel centre."""

    image_HW3: np.ndarray  # uint8 RGB
    depth_HW: np.ndarray  # float64 z-depth in m, inf = sky
    intrinsics: np.ndarray  # (4,) float64: fx, fy, cx, cy in px
    pixel_coords: np.ndarray  # (N, 2) float64: x right, y down, in px
    depth_m: np.ndarray  # (N,) float64 z-depth


@dataclasses.dataclass(frozen=True, eq=False)
class Solid:
    """The room around everything (seen from inside), or a box or a ball that stands on its floor."""

    kind: str  # a key of TILE_M
    centre: np.ndarray  # (3,) origin of the solid's own axes, in the world, m
    yaw: float  # own axes against the world's, rad around Y
    low: np.ndarray  # (3,) smallest own coordinates in m; -inf: no wall on that side
    high: np.ndarray
    albedo: np.ndarray  # (3,) share of SURFACE_RGB that it shows


def render(seed: tuple[int, ...], world: World = WORLDS["wide"]) -> Scene:
    """Returns the scene of a seed: the same numbers give the same scene, bit for bit."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    intrinsics = CAMERAS[world.cameras[rng.integers(len(world.cameras))]]
    shape = int(intrinsics[5]), int(intrinsics[4])
    yaw = rng.uniform(-0.6, 0.6)
    rays_3R = cast_rays(intrinsics, yaw, pitch=rng.uniform(-0.02, 0.32), roll=rng.uniform(-0.04, 0.04))
    solids = place_solids(rng, yaw, world)
    depth_SR = np.stack([first_hit(solid, rays_3R) for solid in solids])
    owner_R, depth_R = depth_SR.argmin(axis=0), depth_SR.min(axis=0)
    rgb_3R, surface_R = paint(rays_3R, depth_R, owner_R, solids, intrinsics[0])
    depth_HW = depth_R.reshape(shape)
    points = choose_points(rng, depth_HW, surface_R.reshape(shape), intrinsics[0], world.label_m)
    return Scene(
        image_HW3=np.ascontiguousarray(rgb_3R.T).reshape(*shape, 3),
        depth_HW=depth_HW,
        intrinsics=intrinsics[:4].copy(),
        pixel_coords=points.astype(np.float64),
        depth_m=depth_HW[points[:, 1], points[:, 0]],
    )


def haze(surface_rgb_3M: np.ndarray, depth_M: np.ndarray) -> np.ndarray:
    """Returns the colours (3, M) that surfaces have at distances in m: their own at 0, HAZE_RGB at infinity."""
    clear_3M = np.exp(-depth_M / HAZE_LENGTH_M[:, None])
    return HAZE_RGB[:, None] + (surface_rgb_3M - HAZE_RGB[:, None]) * clear_3M


def cast_rays(intrinsics: np.ndarray, yaw: float, pitch: float, roll: float) -> np.ndarray:
    """Returns the world directions (3, H·W) of all pixels, scaled so that a multiple is a z-depth; angles in rad."""
    fx, fy, cx, cy, width, height = intrinsics
    x_HW, y_HW = np.meshgrid((np.arange(width) - cx) / fx, (np.arange(height) - cy) / fy)
    rays_3R = np.stack([x_HW, y_HW, np.ones_like(x_HW)]).reshape(3, -1)
    roll_33 = [[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]]
    pitch_33 = [[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]]  # positive: down
    return yaw_matrix(yaw) @ pitch_33 @ roll_33 @ rays_3R


def yaw_matrix(yaw: float) -> np.ndarray:
    """Returns the rotation around Y that turns Z towards X by `yaw` rad."""
    return np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])


def place_solids(rng: Generator, view_yaw: float, world: World) -> list[Solid]:
    """Returns a room (or hall, or open ground) and what stands in it, most of it in view."""
    floor_m = log_uniform(rng, *world.camera_height_m)
    if rng.random() < world.open_ground:
        far_m, low, high = 28.0, np.full(3, -np.inf), np.array([np.inf, floor_m, np.inf])
    else:
        far_m = log_uniform(rng, *world.wall_m)
        left, right, ceiling = rng.uniform(1.2, 2.5, 3) * far_m ** np.array([0.4, 0.4, 0.2])
        low, high = np.array([-left, floor_m - 0.7 - ceiling, -3.0]), np.array([right, floor_m, far_m])
    objects = [place_object(rng, floor_m, (world.nearest_m, far_m), view_yaw) for _ in range(rng.integers(3, 8))]
    return [Solid("room", np.zeros(3), 0.0, low, high, albedo(rng)), *objects]


def place_object(rng: Generator, floor_m: float, range_m: tuple[float, float], view_yaw: float) -> Solid:
    """Returns a box or a ball on the floor, within `range_m` from the camera."""
    distance_m, bearing = log_uniform(rng, *range_m), view_yaw + rng.uniform(-0.5, 0.5)
    half_m = np.full(3, rng.uniform(0.12, 0.3) * distance_m**0.75)
    kind = "box" if rng.random() < 0.65 else "ball"
    if kind == "box":
        half_m *= [1.0, rng.uniform(0.5, 2.0), rng.uniform(0.7, 1.2)]
    centre = np.array([distance_m * np.sin(bearing), floor_m - half_m[1], distance_m * np.cos(bearing)])
    return Solid(kind, centre, rng.uniform(0, np.pi), -half_m, half_m, albedo(rng))


def log_uniform(rng: Generator, low: float, high: float) -> float:
    """Returns a number between low and high, each ratio equally likely."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def albedo(rng: Generator) -> np.ndarray:
    """Returns the share (3,) of light that a surface gives back: little colour, so that the haze tells the distance."""
    return rng.uniform(0.86, 0.98) + rng.uniform(-0.04, 0.04, 3)


def first_hit(solid: Solid, rays_3R: np.ndarray) -> np.ndarray:
    """Returns the z-depth (R,) at which each ray meets the solid in front of the camera, inf where it does not."""
    start_31, own_rays_3R = to_own_axes(solid, np.zeros((3, 1))), yaw_matrix(solid.yaw).T @ rays_3R
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.kind == "ball":
            a_R, b_R = (own_rays_3R**2).sum(0), (own_rays_3R * start_31).sum(0)
            c = (start_31**2).sum() - solid.high[0] ** 2
            near_R = (-b_R - np.sqrt(b_R**2 - a_R * c)) / a_R  # nan: missed
            return np.where(near_R > 0, near_R, np.inf)
        at_low_3R = (solid.low[:, None] - start_31) / own_rays_3R
        at_high_3R = (solid.high[:, None] - start_31) / own_rays_3R
        leave_R = np.maximum(at_low_3R, at_high_3R).min(axis=0)
        if solid.kind == "room":
            return leave_R
        enter_R = np.minimum(at_low_3R, at_high_3R).max(axis=0)
        return np.where((enter_R > 0) & (enter_R < leave_R), enter_R, np.inf)


def to_own_axes(solid: Solid, world_3M: np.ndarray) -> np.ndarray:
    """Returns world points (3, M) in the solid's own axes."""
    return yaw_matrix(solid.yaw).T @ (world_3M - solid.centre[:, None])


def paint(
    rays_3R: np.ndarray, depth_R: np.ndarray, owner_R: np.ndarray, solids: list[Solid], focal_px: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the colour (3, R) uint8 of each ray and the number (R,) of the flat or convex surface that it meets."""
    rgb_3R, surface_R = np.tile(HAZE_RGB[:, None], rays_3R.shape[1]), np.full(len(depth_R), -1)
    for number, solid in enumerate(solids):
        mine = np.flatnonzero((owner_R == number) & np.isfinite(depth_R))
        rays_3M, depth_M = rays_3R[:, mine], depth_R[mine]
        point_3M = to_own_axes(solid, rays_3M * depth_M)
        normal_3M, face_M = own_normal(solid, point_3M)
        world_normal_3M = yaw_matrix(solid.yaw) @ normal_3M
        light_M = 0.8 + 0.2 * np.maximum(LIGHT @ world_normal_3M, 0)
        if solid.kind == "room":
            light_M *= contact_shadow(rays_3M * depth_M, solids[1:])
        slant_M = -(world_normal_3M * rays_3M).sum(0) / np.sqrt((rays_3M**2).sum(0))
        footprint_M = depth_M / focal_px / np.maximum(slant_M, 1e-3)
        light_M *= 1 + 0.07 * tiles(point_3M * (1 - np.abs(normal_3M)), TILE_M[solid.kind], footprint_M)
        rgb_3R[:, mine] = haze((SURFACE_RGB * solid.albedo)[:, None] * light_M, depth_M)
        surface_R[mine] = 8 * number + (face_M if solid.kind == "room" else 0)
    return np.clip(np.round(rgb_3R), 0, 255).astype(np.uint8), surface_R


def own_normal(solid: Solid, point_3M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns normals (3, M) on the viewer's side at surface points, own axes, and the faces (M,), 0 to 5."""
    if solid.kind == "ball":
        return point_3M / solid.high[0], np.zeros(point_3M.shape[1], int)
    away_6M = np.abs(np.concatenate([point_3M - solid.low[:, None], point_3M - solid.high[:, None]]))
    face_M = away_6M.argmin(axis=0)
    outward_36 = np.concatenate([-np.eye(3), np.eye(3)], axis=1)
    return (-outward_36 if solid.kind == "room" else outward_36)[:, face_M], face_M


def tiles(point_3M: np.ndarray, side_m: float, footprint_M: np.ndarray) -> np.ndarray:
    """Returns a checkerboard of ±1 (M,) with tiles of `side_m`, fading where a pixel's footprint in m covers a tile."""
    odd_M = np.floor(point_3M / side_m).sum(axis=0) % 2
    return (1 - 2 * odd_M) * np.exp(-((1.5 * footprint_M / side_m) ** 2))


def contact_shadow(world_3M: np.ndarray, objects: list[Solid]) -> np.ndarray:
    """Returns the share of light (M,) that the objects near a point leave to it."""
    light_M = np.ones(world_3M.shape[1])
    for solid in objects:
        foot_31 = (solid.centre + [0, solid.high[1], 0])[:, None]
        light_M *= 1 - 0.25 * np.exp(-((world_3M - foot_31) ** 2).sum(axis=0) / (1.6 * solid.high[0]) ** 2)
    return light_M


def choose_points(
    rng: Generator, depth_HW: np.ndarray, surface_HW: np.ndarray, focal_px: float, label_m: tuple[float, float]
) -> np.ndarray:
    """Returns POINTS different pixels (N, 2) int x, y: not at border or edge, each ratio of depths equally likely."""
    margin = int(np.ceil(MARGIN_PX * focal_px / 100))
    valid_HW = (depth_HW >= label_m[0]) & (depth_HW <= label_m[1]) & one_surface(surface_HW)
    y_C, x_C = np.nonzero(valid_HW[margin:-margin, margin:-margin])
    y_C, x_C = y_C + margin, x_C + margin
    bin_C = np.floor(np.log(depth_HW[y_C, x_C] / label_m[0]) / np.log(1.18)).astype(int)
    weight_C = 1.0 / np.bincount(bin_C)[bin_C]
    chosen = rng.choice(len(y_C), size=POINTS, replace=False, p=weight_C / weight_C.sum())
    return np.stack([x_C[chosen], y_C[chosen]], axis=1)


def one_surface(surface_HW: np.ndarray) -> np.ndarray:
    """Returns where (H, W) all pixels within EDGE_PX show one surface."""
    height, width = surface_HW.shape
    padded = np.pad(surface_HW, EDGE_PX, mode="edge")
    shifts = range(2 * EDGE_PX + 1)
    low, high = (
        pick.reduce([pick.reduce([padded[y : y + height] for y in shifts])[:, x : x + width] for x in shifts])
        for pick in (np.minimum, np.maximum)
    )
    return low == high


def scene_seed(split_number: int, scene_number: int) -> tuple[int, int, int]:
    """Returns the seed of a scene: no two splits share one."""
    return SEED, split_number, scene_number


@dataclasses.dataclass(frozen=True)
class SplitExamples:
    """The TFDS example of each scene of a split."""

    split_number: int
    world: World

    def __call__(self, scene_number: int) -> dict[str, object]:
        return example(render(scene_seed(self.split_number, scene_number), self.world))


def example(scene: Scene) -> dict[str, object]:
    """Returns the TFDS example of a scene, its picture as PNG."""
    png = io.BytesIO()
    Image.fromarray(scene.image_HW3).save(png, "PNG", compress_level=3)
    height, width = scene.depth_HW.shape
    return {
        "image": png.getvalue(),
        "intrinsics": np.array([*scene.intrinsics, width, height], np.float32),
        "pixel_coords": scene.pixel_coords.astype(np.float32),
        "depth": scene.depth_m.astype(np.float32),
        "depth_kind": "z",
        "dataset": DATASET,
    }


def build(
    data_dir: str | Path,
    train_scenes: int,
    val_scenes: int,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
    world: str = "wide",
) -> Path:
    """Returns the folder of the prepared data set, to be given as `Source.path`; renders it unless it is there.

    Args:
      data_dir: folder of TFDS data sets; made if need be.
      train_scenes: scenes of the split `train`.
      val_scenes: scenes of the split `validation`.
      progress: called with the number of scenes done and of all scenes.
      workers: processes; see `writer.write` for what more than one needs.
      world: a key of WORLDS.
    """
    name = "" if world == "wide" else f"{world}_"
    home = Path(data_dir) / f"{name}{train_scenes}_{val_scenes}"  # copies of other sizes stay untouched beside it
    counts = dict(zip(SPLITS, (train_scenes, val_scenes), strict=True))
    examples = (SplitExamples(number, WORLDS[world]) for number in range(len(SPLITS)))
    splits = {split: (count, of) for (split, count), of in zip(counts.items(), examples, strict=True)}
    if train_scenes + val_scenes <= ONE_PROCESS_SCENES:
        workers = 1
    shards = SHARDS if workers > 1 else 1
    return writer.write(home / DATASET / VERSION, DATASET, splits, shards, workers, progress)
