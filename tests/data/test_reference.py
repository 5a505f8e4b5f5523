import numpy as np
import pytest

from depthlm_jax.data.reference import arrow_fits, draw_arrow
from depthlm_jax.errors import InputError

ARROW_AT_6_5 = """
...........
...........
...........
...#.......
....#......
.#####.....
....#......
...#.......
...........
...........
...........
"""


def painted(image, x, y, scale=1):
    return np.any(draw_arrow(image, x, y, scale) != image, axis=-1)


def picture(mask_HW):
    return "\n".join("".join(".#"[on] for on in row) for row in mask_HW.astype(int))


def grey(width, height):
    return np.full((height, width, 3), 90, np.uint8)


def test_arrow_of_the_release():
    marked = draw_arrow(grey(12, 11), 6, 5)
    red = np.all(marked == (255, 0, 0), axis=-1)
    assert picture(red[:, :11]) == ARROW_AT_6_5.strip()
    assert np.all(marked[~red] == 90)


def test_source_image_is_left_alone():
    image = grey(40, 40)
    draw_arrow(image, 20, 20)
    assert np.all(image == 90)


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5, 8])
def test_scaled_arrow_is_the_magnified_arrow(scale):
    small = painted(grey(13, 13), 6, 6)
    large = painted(grey(13 * scale, 13 * scale), 6 * scale + scale // 2, 6 * scale + scale // 2, scale)
    assert np.array_equal(large, np.kron(small, np.ones((scale, scale), bool)))


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5, 8])
def test_query_pixel_stays_visible_and_nothing_is_cut_at_the_limits(scale):
    width, height = 20 * scale, 16 * scale
    y, x = (grid.ravel() for grid in np.mgrid[0:height, 0:width])
    points = np.stack([x, y], -1)
    fits = arrow_fits(width, height, points, scale)
    corners = [points[fits].min(axis=0), points[fits].max(axis=0)]
    for x, y in corners:
        mask = painted(grey(width, height), x, y, scale)
        assert mask.sum() == 9 * scale**2 and not mask[y, x]
        ys, xs = np.nonzero(mask)
        assert xs.max() < x and xs.min() >= x - 5 * scale - scale // 2
        assert abs(ys - y).max() <= 2 * scale + scale // 2


def test_guard_of_the_release():
    points = np.array([[5, 5], [4, 5], [5, 4], [94, 74], [95, 74], [94, 75]])
    assert arrow_fits(100, 80, points).tolist() == [True, False, False, True, False, False]


def test_arrow_that_does_not_fit_is_an_error():
    with pytest.raises(InputError, match=r"point \(4, 20\) of an image of 40x40 px(.|\n)*at least 5 px"):
        draw_arrow(grey(40, 40), 4, 20)
