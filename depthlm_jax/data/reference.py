"""How a pixel is pointed at: a tiny red arrow to its left, drawn last, on the image that the model sees."""

import numpy as np

from depthlm_jax.errors import InputError

RED = (255, 0, 0)
ARROW = (  # (dx, dy) of the nine squares from the query pixel, which stays visible
    (-1, 0), (-2, 0), (-3, 0), (-4, 0), (-5, 0),
    (-2, -1), (-2, 1), (-3, -2), (-3, 2),
)  # fmt: skip


def arrow_fits(width: int, height: int, points: np.ndarray, scale: int = 1) -> np.ndarray:
    """Returns (N,) bool: the arrow lies in the image, with the same margin on all four sides (5 px at scale 1).

    Args:
      width: px.
      height: px.
      points: (N, 2) integer x, y of the query pixels.
      scale: side in px of each square.
    """
    points = np.asarray(points).reshape(-1, 2)
    margin = 5 * scale + scale // 2
    return np.all((points >= margin) & (points < np.array([width, height]) - margin), axis=1)


def draw_arrow(image: np.ndarray, x: int, y: int, scale: int = 1) -> np.ndarray:
    """Returns a copy of the image with the arrow that points at (x, y).

    Args:
      image: uint8 (height, width, 3).
      x: query pixel, from the left; it is not painted.
      y: query pixel, from the top.
      scale: side in px of each of the nine squares; 1 is the arrow of the release.

    Raises:
      InputError: the arrow does not fit.

    Source: DepthLM section 3 (visual marker).
    """
    height, width = image.shape[:2]
    if not arrow_fits(width, height, np.array([[x, y]]), scale)[0]:
        margin = 5 * scale + scale // 2
        raise InputError(
            "marker: the arrow does not fit", found=f"point ({x}, {y}) of an image of {width}x{height} px",
            expected=f"at least {margin} px from the left and top, {margin + 1} from the right and bottom edge",
            fix="choose another point, or a smaller data.marker_scale",
        )  # fmt: skip
    marked = image.copy()
    for dx, dy in ARROW:
        left, top = x + dx * scale - scale // 2, y + dy * scale - scale // 2
        marked[top : top + scale, left : left + scale] = RED
    return marked
