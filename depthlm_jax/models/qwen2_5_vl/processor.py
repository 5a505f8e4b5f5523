"""An image as Qwen2.5-VL sees it: patches in window-major order, M-RoPE positions. Host only."""

import functools

import numpy as np

from depthlm_jax.models import processor
from depthlm_jax.models.qwen2_5_vl.config import read_config


class Processor(processor.Processor):
    """Source: HF Qwen2_5_VLProcessor, Qwen2VLImageProcessor, get_rope_index, get_vision_window_index."""

    read_config = staticmethod(read_config)
    STOPS = ("<|im_end|>", "<|endoftext|>")  # as in the published generation_config.json
    IMAGE = "<|image_pad|>"
    IMAGE_END = "<|vision_end|>"
    DANGLING = "\n<|im_start|>assistant\n"

    def image_size(self, width_N: np.ndarray, height_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows_N, columns_N = height_N // self.config.grid_px, width_N // self.config.grid_px
        slots_N = self.merged_slots(rows_N, columns_N) * self.config.patches_per_merged
        return rows_N * columns_N, slots_N, np.zeros_like(slots_N)

    def merged_slots(self, rows: int, columns: int) -> int:
        """Whole windows."""
        window = self.config.vision.window_merged
        return -(-rows // window) * -(-columns // window) * window**2

    def unfold(self, rows: int, columns: int) -> processor.ImageTokens:
        r, c = np.divmod(np.arange(rows * columns), columns)
        return processor.ImageTokens(
            tokens_N=np.full(rows * columns, self.config.image_token_id),
            slot_N=_window_slots(rows, columns, self.config.vision.window_merged),
            positions_N3=np.stack([np.zeros_like(r), r, c], axis=-1),
            advance=max(rows, columns),
        )

    def patches(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Window-major, merge-block-minor."""
        vision, grid = self.config.vision, self.config.grid_px
        window, merge = vision.window_merged, vision.spatial_merge_size
        places = _patch_places(image.shape[0] // grid, image.shape[1] // grid, window, merge)
        return _window_patches(image, window, merge, vision.patch_size), *places


@functools.lru_cache(maxsize=4096)
def _window_slots(rows: int, columns: int, window: int) -> np.ndarray:
    """Returns, for each merged patch in raster order, its slot in window-major order."""
    r, c = np.divmod(np.arange(rows * columns), columns)
    windows_across = -(-columns // window)
    number = (r // window) * windows_across + c // window
    return number * window**2 + (r % window) * window + c % window


@functools.lru_cache(maxsize=4096)
def _patch_places(rows: int, columns: int, window: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns row and column in the image of each patch slot [P, 2], and whether a patch is there [P]."""
    down, across = -(-rows // window), -(-columns // window)
    r, c = np.meshgrid(np.arange(down * window * merge), np.arange(across * window * merge), indexing="ij")
    rc = np.stack([r, c], axis=-1).reshape(down, window, merge, across, window, merge, 2)
    rc_P2 = rc.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, 2)
    return rc_P2, (rc_P2 < np.array([rows, columns]) * merge).all(axis=-1)


def _window_patches(image: np.ndarray, window: int, merge: int, patch: int) -> np.ndarray:
    """Returns patches_PC uint8 of an image, window-major, merge-block-minor; slots beyond the edge are zero."""
    side = window * merge * patch
    height, width, channels = image.shape
    down, across = -(-height // side), -(-width // side)
    planes = np.zeros((channels, down * side, across * side), np.uint8)
    planes[:, :height, :width] = image.transpose(2, 0, 1)
    lines = planes.view(f"V{patch}")  # a patch's line of one colour is moved as one piece
    lines = lines.reshape(channels, down, window, merge, patch, across, window, merge)
    in_order = np.ascontiguousarray(lines.transpose(1, 5, 2, 6, 3, 7, 0, 4))
    return in_order.view(np.uint8).reshape(down * across * (window * merge) ** 2, -1)
