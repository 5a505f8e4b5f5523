"""How a pixel is pointed at: by a small marker, drawn last on the image that the model sees, or by its coordinates."""

import numpy as np

from depthlm_jax.config_rules import COLORS
from depthlm_jax.errors import InputError

NORMAL_SIDE = 2000  # normalised coordinates go from 0 up to, not including, this
NORMAL_NOTE = "The coordinates are in normalised [0, 2000] format relative to image width and height."
MARKERS = {  # mode → (dx, dy) of its squares from the query pixel's; ours but for the arrow, which is the release's
    "arrow": (  # points right; the query stays visible
        (-1, 0), (-2, 0), (-3, 0), (-4, 0), (-5, 0),
        (-2, -1), (-2, 1), (-3, -2), (-3, 2),
    ),
    # A disc of radius 2: the only one that covers the query.
    "dot": tuple((dx, dy) for dy in range(-2, 3) for dx in range(-2, 3) if dx**2 + dy**2 <= 5),
    # Four arms of three squares around the query, which stays visible.
    "cross": tuple((sign * arm * (1 - up), sign * arm * up) for up in (0, 1) for sign in (-1, 1) for arm in (1, 2, 3)),
    # The outline of 7×7 squares; the query stays visible.
    "square": tuple((dx, dy) for dy in range(-3, 4) for dx in range(-3, 4) if max(abs(dx), abs(dy)) == 3),
}  # fmt: skip
PLACES = {  # mode → what one point is called, what two points are called
    "arrow": ("the point pointed by the {color} arrow", "the 2 points pointed by the {color} arrows"),
    "dot": ("the point marked by the {color} dot", "the 2 points marked by the {color} dots"),
    "cross": ("the point marked by the {color} cross", "the 2 points marked by the {color} crosses"),
    "square": ("the point marked by the {color} square", "the 2 points marked by the {color} squares"),
    "text_raw": ("the pixel at {0}", "the pixels at {0} and {1}"),
    "text_norm": ("the point at coordinates {0}", "the points at coordinates {0} and {1}"),
}


def fits(mode: str, scale: int, width: int, height: int, points_N2: np.ndarray) -> np.ndarray:
    """Returns (N,) bool: the marker lies in the image, with the same margin on all four sides.

    The margin is how far the marker reaches in its farthest direction: 5 px for the arrow at scale 1, as in the
    release. A mode without a marker needs none: all points of the image fit.

    Args:
      mode: of `config.Reference`.
      scale: side in px of each square.
      width: px.
      height: px.
      points_N2: integer x, y of the query pixels.
    """
    points_N2, margin = np.asarray(points_N2).reshape(-1, 2), _margin(mode, scale)
    return np.all((points_N2 >= margin) & (points_N2 < np.array([width, height]) - margin), axis=1)


def separate(mode: str, scale: int, point: np.ndarray, others_N2: np.ndarray) -> np.ndarray:
    """Returns (N,) bool: both can be pointed at in one image; their markers cover neither each other nor a query.

    Without a marker: they are different pixels.
    """
    farther = np.abs(np.asarray(others_N2).reshape(-1, 2) - np.asarray(point)).max(axis=1)
    return farther >= (2 * _reach(mode) + 1) * (scale if mode in MARKERS else 1)


def draw(image: np.ndarray, points_N2: np.ndarray, mode: str, scale: int = 1, color: str = "red") -> np.ndarray:
    """Returns a copy of the image with a marker at each point; in a mode without a marker, the image itself.

    Args:
      image: uint8 (height, width, 3).
      points_N2: integer x, y of the query pixels, from the left and the top.
      mode: of `config.Reference`.
      scale: side in px of each of the marker's squares; 1 with the arrow is the marker of the release.
      color: of `config_rules.COLORS`.

    Raises:
      InputError: a marker does not fit.

    Source: DepthLM section 3 (visual marker).
    """
    if mode not in MARKERS:
        return image
    points_N2 = np.asarray(points_N2).reshape(-1, 2)
    height, width = image.shape[:2]
    _check_fits(mode, scale, width, height, points_N2)
    marked = image.copy()
    for x, y in points_N2:
        for dx, dy in MARKERS[mode]:
            left, top = x + dx * scale - scale // 2, y + dy * scale - scale // 2
            marked[top : top + scale, left : left + scale] = COLORS[color]
    return marked


def place(mode: str, color: str, points_N2: np.ndarray, width: int, height: int) -> str:
    """Returns what a question calls its one or two points. No point has a longer name than the image's last one.

    >>> place("arrow", "red", [(5, 7)], 640, 480)
    'the point pointed by the red arrow'
    >>> place("cross", "blue", [(5, 7), (320, 9)], 640, 480)
    'the 2 points marked by the blue crosses'
    >>> place("text_raw", "red", [(5, 7)], 640, 480)
    'the pixel at (5, 7)'
    >>> place("text_norm", "red", [(5, 7), (320, 9)], 640, 480)
    'the points at coordinates (17, 31) and (1001, 39)'
    """
    pixels = [(int(x), int(y)) for x, y in points_N2]
    if mode == "text_norm":
        pixels = [normalise(x, y, width, height) for x, y in pixels]
    return PLACES[mode][len(pixels) - 1].format(*(f"({x}, {y})" for x, y in pixels), color=color)


def note(mode: str) -> str:
    """Returns the sentence that a question needs to explain its places, or ''."""
    return NORMAL_NOTE if mode == "text_norm" else ""


def normalise(x: int, y: int, width: int, height: int) -> tuple[int, int]:
    """Returns a pixel's x and y in [0, 2000): floor((x + 0.5) / width · 2000), likewise y; in whole numbers, exact.

    >>> normalise(0, 0, 640, 480), normalise(320, 240, 640, 480), normalise(639, 479, 640, 480)
    ((1, 2), (1001, 1002), (1998, 1997))

    Source: VLM3's format; its rounding is not published, this one is ours: the cell that the pixel's centre is in.
    """
    half = NORMAL_SIDE // 2
    return (2 * x + 1) * half // width, (2 * y + 1) * half // height


def _reach(mode: str) -> int:
    """Returns how many squares the marker reaches from the query's, in its farthest direction."""
    return int(np.abs(MARKERS[mode]).max()) if mode in MARKERS else 0


def _margin(mode: str, scale: int) -> int:
    return _reach(mode) * scale + scale // 2 if mode in MARKERS else 0


def _check_fits(mode: str, scale: int, width: int, height: int, points_N2: np.ndarray) -> None:
    outside_N2 = points_N2[~fits(mode, scale, width, height, points_N2)]
    if len(outside_N2):
        margin, (x, y) = _margin(mode, scale), outside_N2[0]
        raise InputError(
            f"marker: the {mode} does not fit", found=f"point ({x}, {y}) of an image of {width}x{height} px",
            expected=f"at least {margin} px from the left and top, {margin + 1} from the right and bottom edge",
            fix="choose another point, or a smaller data.reference.scale",
        )  # fmt: skip
