"""Encoded image → pixels: the header first, so that a view can be planned; then no more detail than the view shows."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from depthlm_jax.data import camera
from depthlm_jax.data.depth_record import DepthRecord, validate
from depthlm_jax.errors import InputError

MAX_IMAGE_PIXELS = 80_000_000  # below Pillow's own warning; the largest public depth photographs have 24 million
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height
REPLACE = "replace the image file"


@dataclasses.dataclass(frozen=True, eq=False)
class Opened:
    """An image whose header has been read and checked; its pixels may still be damaged."""

    record: DepthRecord
    size: tuple[int, int]  # width, height in px of the upright (EXIF-oriented) image
    file: Image.Image  # at full size, not turned

    def pixels(self, reduction: int = 1) -> tuple[np.ndarray, int]:
        """Returns the upright image, (H, W, 3) uint8 RGB, and the reduction it has.

        Args:
          reduction: 1, 2, 4 or 8: JPEG files may be decoded at 1/reduction of their size, rounded up.

        Raises:
          InputError: the file is damaged or cut short.
        """
        file, done = self.file, 1
        with _decoding(self.record):
            if self._reducible() and min(file.size) >= reduction > 1:
                file, done = Image.open(io.BytesIO(self.record.image)), reduction
                file.draft(None, (file.width // reduction, file.height // reduction))
            if file.mode != "RGB":
                file = file.convert("RGB")
            return np.asarray(_upright(file)), done

    def _reducible(self) -> bool:
        # Turning would move the edge that libjpeg repeats to fill its last pixels.
        return self.file.format in ("JPEG", "MPO") and _orientation(self.file) == 1


def open_image(record: DepthRecord) -> Opened:
    """Returns a record's image without its pixels.

    Raises:
      InputError: no header of an 8-bit image of at most MAX_IMAGE_PIXELS; its size is not the declared one; a point
        lies outside it. Formats that may tell their orientation at the end (PNG) are decoded, and may be damaged.
    """
    with _decoding(record):
        file = Image.open(io.BytesIO(record.image))
        if file.width * file.height > MAX_IMAGE_PIXELS:
            raise _error(record, "image is too large", file.size, f"at most {MAX_IMAGE_PIXELS} pixels", REPLACE)
        if file.mode.startswith(("I", "F")):  # Pillow would clip it to 255
            raise _error(
                record, "image has over 8 bits a channel", f"Pillow mode {file.mode}", "8-bit colour or grey", REPLACE
            )
        size = file.size[::-1] if _orientation(file) in SIDEWAYS else file.size
    if record.size is None:
        validate(dataclasses.replace(record, size=size))
    elif record.size != size:
        raise _error(
            record, "image size is not the declared one", f"{size} decoded, {record.size} declared",
            "the same width and height", "correct W, H of the record's intrinsics, or the image",
        )  # fmt: skip
    return Opened(record, size, file)


def decode_image(record: DepthRecord) -> np.ndarray:
    """Returns the upright image of a record, (H, W, 3) uint8 RGB; raises InputError as `open_image` and `pixels` do."""
    return open_image(record).pixels()[0]


def render(opened: Opened, view: camera.View) -> np.ndarray:
    """Returns the uint8 image (H, W, 3) that a view shows; raises InputError if the file is damaged."""
    return camera.apply_view(view, *opened.pixels(view.reduction))


def _orientation(file: Image.Image) -> int:
    return file.getexif().get(ExifTags.Base.Orientation, 1)


def _upright(file: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(file) if _orientation(file) != 1 else file  # Pillow would copy it


@contextlib.contextmanager
def _decoding(record: DepthRecord) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise _error(record, "image is too large", error, f"at most {MAX_IMAGE_PIXELS} pixels", REPLACE) from None
    except Exception as error:  # noqa: BLE001 Pillow's readers raise nearly every kind for damaged bytes
        found = f"{error}, {len(record.image)} bytes"
        raise _error(record, "cannot decode image", found, "a complete image", REPLACE) from None


def _error(record: DepthRecord, what: str, found: object, expected: str, fix: str) -> InputError:
    return InputError(f"{record.record_id}: {what}", found=found, expected=expected, fix=fix)
