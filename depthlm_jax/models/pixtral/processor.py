"""An image as Pixtral sees it: patches in raster order, a word at the end of each of their rows. Host only."""

from pathlib import Path

import numpy as np

from depthlm_jax.models import processor
from depthlm_jax.models.pixtral.config import read_config


class Processor(processor.Processor):
    """Source: HF PixtralProcessor, PixtralImageProcessor."""

    read_config = staticmethod(read_config)
    STOPS = ("</s>",)
    IMAGE = IMAGE_END = "[IMG]"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.row_end, self.last_row_end = self._token("[IMG_BREAK]"), self._token("[IMG_END]")

    def image_size(self, width_N: np.ndarray, height_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows_N, columns_N = height_N // self.config.grid_px, width_N // self.config.grid_px
        return rows_N * (columns_N + 1), rows_N * columns_N, rows_N

    def merged_slots(self, rows: int, columns: int) -> int:
        return rows * columns

    def unfold(self, rows: int, columns: int) -> processor.ImageTokens:
        tokens = np.full((rows, columns + 1), self.config.image_token_id)
        tokens[:, -1] = self.row_end
        tokens[-1, -1] = self.last_row_end
        slots = np.full((rows, columns + 1), -1)
        slots[:, :-1] = np.arange(rows * columns).reshape(rows, columns)
        positions = np.repeat(np.arange(tokens.size)[:, None], 3, axis=1)
        return processor.ImageTokens(tokens.ravel(), slots.ravel(), positions, advance=tokens.size)

    def patches(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Raster order, no padding."""
        side = self.config.grid_px
        rows, columns = image.shape[0] // side, image.shape[1] // side
        lines = image.transpose(2, 0, 1).reshape(-1, rows, side, columns, side)
        patches = np.ascontiguousarray(lines.transpose(1, 3, 0, 2, 4)).reshape(rows * columns, -1)
        return patches, np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1), np.ones(rows * columns, bool)
