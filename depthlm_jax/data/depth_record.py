"""A depth record, and how it comes from fields as they are stored: checked, whatever is wrong named with the record."""

import dataclasses
import io
from typing import NoReturn

import numpy as np

from depthlm_jax.data import index as record_index
from depthlm_jax.errors import InputError

DEPTH_KINDS = ("z", "ray")
POSE_TOLERANCE = 1e-3  # of RᵀR = 1; calibration files round


@dataclasses.dataclass(frozen=True, eq=False)
class DepthRecord:
    """One image with metric depth at some of its pixels; pixel units are those of the upright (EXIF-oriented) image."""

    record_id: str  # "train.jsonl:12" (line, from 1) or "synthetic_depth/train:12" (index, from 0)
    image: bytes  # the encoded image file, as stored
    intrinsics: np.ndarray  # (4,) float64: fx, fy, cx, cy in px; an integer coordinate is a pixel centre
    pixel_coords: np.ndarray  # (N, 2) float64: x right, y down, in px
    depth_m: np.ndarray  # (N,) float64
    depth_kind: str  # z (along the principal axis) or ray (Euclidean)
    dataset: str
    size: tuple[int, int] | None  # width, height in px as declared; None: the record does not say
    pose: np.ndarray | None = None  # (4, 4) float64 camera-to-world, metres; None: not known
    scene: str = ""  # poses of one scene share a world; "": not known


def record_of(record_id: str, fields: dict, fov_degrees: float) -> DepthRecord:
    """Returns the record that has these fields.

    Args:
      record_id: see `DepthRecord`.
      fields: as in a line of JSONL, but `image` is the bytes of the file; `depth_kind` and `dataset` are needed too.
      fov_degrees: horizontal field of view assumed if the intrinsics are unknown; 0: that is an error.

    Raises:
      InputError: a field is missing or wrong, as far as it can be told without decoding the image.
    """
    intrinsics, size = _camera(record_id, fields, fov_degrees)
    return validate(
        DepthRecord(
            record_id=record_id,
            image=field_of(record_id, fields, "image"),
            intrinsics=intrinsics,
            pixel_coords=_numbers(record_id, fields, "pixel_coords", (-1, 2)),
            depth_m=_numbers(record_id, fields, "depth", (-1,)),
            depth_kind=fields["depth_kind"],
            dataset=str(fields["dataset"]),
            size=size,
            pose=_pose(record_id, fields),
            scene=_scene(record_id, fields),
        )
    )


def validate(record: DepthRecord) -> DepthRecord:
    """Returns the record if all that can be told without decoding the image is right; raises InputError if not."""
    fail_at = record.record_id
    if record.depth_kind not in DEPTH_KINDS:
        fail(fail_at, "unknown depth_kind", repr(record.depth_kind), " or ".join(DEPTH_KINDS), "correct the record")
    if not (np.isfinite(record.intrinsics).all() and (record.intrinsics[:2] > 0).all()):
        fail(fail_at, "bad intrinsics", record.intrinsics.tolist(), "finite fx, fy, cx, cy in px, fx > 0, fy > 0",
             "give the camera's calibration, or leave the record out")  # fmt: skip
    points, depths = record.pixel_coords, record.depth_m
    if len(points) != len(depths):
        fail(fail_at, "pixel_coords and depth differ in length", f"{len(points)} points, {len(depths)} depths",
             "one depth a point", "correct the record")  # fmt: skip
    if len(points) == 0:
        fail(fail_at, "no points", "empty pixel_coords", "at least 1 point", "leave the record out")
    bad = np.flatnonzero(~(np.isfinite(depths) & (depths > 0)))
    if len(bad):
        fail(fail_at, "depth is not a positive finite number", f"{depths[bad[0]]} m at point {bad[0]}", "metres > 0",
             "leave points without measured depth out")  # fmt: skip
    if record.size is not None:
        check_points_inside(record, record.size)
    if record.pose is not None:
        _check_pose(fail_at, record.pose)
    return record


def _camera(record_id: str, fields: dict, fov_degrees: float) -> tuple[np.ndarray, tuple[int, int] | None]:
    """Returns fx, fy, cx, cy, assumed if the record leaves them open and a field of view is given; and W, H if told."""
    unknown, declared = record_index.is_unknown(fields.get("intrinsics")), np.zeros(0)
    if fields.get("intrinsics") is not None:
        intrinsics = _numbers(record_id, fields, "intrinsics", (-1,))
        if len(intrinsics) not in (4, 6):
            fail(record_id, "wrong number of intrinsics", f"{len(intrinsics)} numbers", "fx, fy, cx, cy, or also W, H",
                 "correct the record")  # fmt: skip
        declared = intrinsics[4:]
    if not (np.isfinite(declared).all() and (declared > 0).all() and (declared == np.round(declared)).all()):
        fail(record_id, "bad image size W, H", declared.tolist(), "whole numbers > 0 in px", "correct the record")
    size = (int(declared[0]), int(declared[1])) if len(declared) else None
    if not unknown:
        return intrinsics[:4], size
    if not fov_degrees:
        fail(record_id, "unknown intrinsics", "no focal length", "fx, fy, cx, cy in px",
             "add the camera's calibration, or set fov_degrees of the source to assume a field of view")  # fmt: skip
    width, height = size or _upright_size(record_id, field_of(record_id, fields, "image"))
    focal = record_index.focal_from_fov(width, fov_degrees)
    return np.array([focal, focal, (width - 1) / 2, (height - 1) / 2]), size


def _upright_size(record_id: str, image: bytes) -> tuple[int, int]:
    try:
        return record_index.upright_size(io.BytesIO(image))
    except Exception as error:  # noqa: BLE001 Pillow's readers raise nearly every kind for damaged bytes
        fail(record_id, "cannot decode image", f"{error}, {len(image)} bytes", "a complete image",
             "replace the image file")  # fmt: skip


def _pose(record_id: str, fields: dict) -> np.ndarray | None:
    """Returns the camera-to-world matrix (4, 4); the last row may be left out."""
    if fields.get("pose") is None:
        return None
    pose = _numbers(record_id, fields, "pose", (-1, 4))
    if len(pose) not in (3, 4):
        fail(record_id, "pose is not a matrix of 3 or 4 rows", f"{len(pose)} rows", "camera-to-world, 3 × 4 or 4 × 4",
             "correct the record")  # fmt: skip
    return np.concatenate([pose, [[0.0, 0.0, 0.0, 1.0]]]) if len(pose) == 3 else pose


def _check_pose(record_id: str, pose_44: np.ndarray) -> None:
    rotation_33 = pose_44[:3, :3]
    rigid = (
        np.isfinite(pose_44).all()
        and np.abs(rotation_33.T @ rotation_33 - np.eye(3)).max() <= POSE_TOLERANCE
        and np.linalg.det(rotation_33) > 0
        and pose_44[3].tolist() == [0, 0, 0, 1]
    )
    if not rigid:
        fail(record_id, "pose is not a rotation and a shift", pose_44.tolist(),
             "finite, an orthonormal right-handed rotation, last row 0, 0, 0, 1",
             "correct the record, or leave its pose out")  # fmt: skip


def _scene(record_id: str, fields: dict) -> str:
    scene = "" if fields.get("scene") is None else fields["scene"]
    if not isinstance(scene, str):
        fail(record_id, "scene is not a text", repr(scene)[:80], "a name", "correct the record")
    return scene


def _numbers(record_id: str, fields: dict, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a field as float64; -1 in `shape` stands for any length."""
    value = field_of(record_id, fields, name)
    try:
        numbers = np.asarray(value)
    except ValueError:  # rows of unequal length
        numbers = np.asarray(None)
    if numbers.size == 0:
        numbers = np.zeros([max(length, 0) for length in shape])
    fits = numbers.ndim == len(shape) and numbers.shape[1:] == shape[1:]
    if not fits or numbers.dtype.kind not in "iuf":
        expected = "numbers of shape " + " × ".join("N" if length < 0 else str(length) for length in shape)
        fail(record_id, f"{name} is not an array of numbers", str(value)[:80], expected, "correct the record")
    return numbers.astype(np.float64)


def field_of(record_id: str, fields: dict, name: str) -> object:
    """Returns a field; raises InputError if there is none."""
    if name not in fields:
        fail(record_id, f"{name!r} is missing", f"fields {sorted(fields)}", "image, intrinsics, pixel_coords, depth",
             "add it to the record")  # fmt: skip
    return fields[name]


def check_points_inside(record: DepthRecord, size: tuple[int, int]) -> None:
    """Raises InputError if a point is in no pixel; the first pixel's area starts at -0.5."""
    inside_N = ((record.pixel_coords >= -0.5) & (record.pixel_coords < np.array(size) - 0.5)).all(axis=1)
    if not inside_N.all():
        index = int(np.argmin(inside_N))
        fail(record.record_id, "point outside the image", f"{record.pixel_coords[index].tolist()} at point {index}",
             f"x < {size[0]}, y < {size[1]}, not negative", "correct the record (x is first)")  # fmt: skip


def fail(record_id: str, what: str, found: object, expected: str, fix: str) -> NoReturn:
    """Raises the InputError of a record."""
    raise InputError(f"{record_id}: {what}", found=found, expected=expected, fix=fix)
