import doctest

import numpy as np
import pytest

from depthlm_jax import config_rules
from depthlm_jax.data import reference
from depthlm_jax.data.reference import MARKERS, PLACES, draw, fits, normalise, note, place, separate
from depthlm_jax.errors import InputError

PICTURES = {  # the query pixel is the one in the middle
    "arrow": """
...........
...........
...........
..#........
...#.......
#####......
...#.......
..#........
...........
...........
...........
""",
    "dot": """
...........
...........
...........
....###....
...#####...
...#####...
...#####...
....###....
...........
...........
...........
""",
    "cross": """
...........
...........
.....#.....
.....#.....
.....#.....
..###.###..
.....#.....
.....#.....
.....#.....
...........
...........
""",
    "square": """
...........
...........
..#######..
..#.....#..
..#.....#..
..#.....#..
..#.....#..
..#.....#..
..#######..
...........
...........
""",
}
SCALES = [1, 2, 3, 4, 5, 8]


def grey(width, height):
    return np.full((height, width, 3), 90, np.uint8)


def painted(image, x, y, mode, scale=1):
    return np.any(draw(image, [(x, y)], mode, scale) != image, axis=-1)


def picture(mask_HW):
    return "\n".join("".join(".#"[on] for on in row) for row in mask_HW.astype(int))


def all_pixels(width, height):
    y, x = (grid.ravel() for grid in np.mgrid[0:height, 0:width])
    return np.stack([x, y], -1)


def test_modes_are_those_of_the_config():
    assert tuple(MARKERS) == config_rules.MARKERS == tuple(PICTURES)
    assert tuple(PLACES) == (*config_rules.MARKERS, *config_rules.TEXT_MODES)


@pytest.mark.parametrize("mode", PICTURES)
def test_markers_pixel_by_pixel(mode):
    marked = draw(grey(11, 11), [(5, 5)], mode)
    red = np.all(marked == (255, 0, 0), axis=-1)
    assert picture(red) == PICTURES[mode].strip()
    assert np.all(marked[~red] == 90)


def test_arrow_of_the_release():
    marked = draw(grey(12, 11), [(6, 5)], "arrow")
    red = {(int(x), int(y)) for y, x in np.argwhere(np.all(marked == (255, 0, 0), axis=-1))}
    assert red == {(5, 5), (4, 5), (3, 5), (2, 5), (1, 5), (4, 4), (4, 6), (3, 3), (3, 7)}


@pytest.mark.parametrize("mode", PICTURES)
@pytest.mark.parametrize("scale", SCALES)
def test_scaled_marker_is_the_magnified_marker(mode, scale):
    small = painted(grey(13, 13), 6, 6, mode)
    middle = 6 * scale + scale // 2
    large = painted(grey(13 * scale, 13 * scale), middle, middle, mode, scale)
    assert np.array_equal(large, np.kron(small, np.ones((scale, scale), bool)))


def test_a_marker_at_scale_2():
    expected = """
..............
....######....
....######....
..##########..
..##########..
..##########..
..##########..
..##########..
..##########..
....######....
....######....
..............
"""
    assert picture(painted(grey(14, 12), 7, 6, "dot", 2)) == expected.strip()


@pytest.mark.parametrize("mode", PICTURES)
@pytest.mark.parametrize("scale", SCALES)
def test_what_fits_is_drawn_whole_and_only_the_dot_covers_the_query(mode, scale):
    width, height = 20 * scale, 16 * scale
    points_N2 = all_pixels(width, height)
    fit_N = fits(mode, scale, width, height, points_N2)
    for x, y in [points_N2[fit_N].min(axis=0), points_N2[fit_N].max(axis=0)]:
        mask = painted(grey(width, height), x, y, mode, scale)
        assert mask.sum() == len(MARKERS[mode]) * scale**2
        assert mask[y, x] == (mode == "dot")
        if mode != "dot":
            left, top = x - scale // 2, y - scale // 2
            assert not mask[top : top + scale, left : left + scale].any()


@pytest.mark.parametrize("mode", ["dot", "cross", "square"])
@pytest.mark.parametrize("scale", [1, 3])
def test_symmetric_marker_fits_wherever_it_is_whole(mode, scale):
    width, height, border = 9 * scale, 8 * scale, 8 * scale
    whole = len(MARKERS[mode]) * scale**2
    wide = grey(width + 2 * border, height + 2 * border)
    points_N2 = all_pixels(width, height)
    inside_N = [
        painted(wide, x + border, y + border, mode, scale)[border:-border, border:-border].sum() == whole
        for x, y in points_N2
    ]
    assert np.array_equal(fits(mode, scale, width, height, points_N2), inside_N)


def test_guard_of_the_release():
    points = np.array([[5, 5], [4, 5], [5, 4], [94, 74], [95, 74], [94, 75]])
    assert fits("arrow", 1, 100, 80, points).tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize("mode", config_rules.TEXT_MODES)
def test_text_modes_reach_every_pixel_and_paint_none(mode):
    image = grey(40, 30)
    assert fits(mode, 8, 40, 30, all_pixels(40, 30)).all()
    assert draw(image, [(0, 0)], mode, 8) is image


@pytest.mark.parametrize("color", config_rules.COLORS)
def test_colours(color):
    marked = draw(grey(40, 40), [(20, 20)], "cross", 2, color)
    changed = np.any(marked != 90, axis=-1)
    assert changed.sum() == 48 and np.all(marked[changed] == config_rules.COLORS[color])


def test_two_points_get_a_marker_each_and_the_source_is_left_alone():
    image = grey(60, 40)
    both = draw(image, [(20, 20), (40, 9)], "square", 2)
    one_by_one = draw(draw(image, [(20, 20)], "square", 2), [(40, 9)], "square", 2)
    assert np.array_equal(both, one_by_one)
    assert np.all(image == 90)


@pytest.mark.parametrize("mode", PICTURES)
@pytest.mark.parametrize("scale", [1, 2, 3])
def test_separate_markers_leave_each_other_and_the_queries_alone(mode, scale):
    size, image = 40 * scale, grey(40 * scale, 40 * scale)
    first = np.array([size // 2, size // 2])
    others_N2 = all_pixels(size, size)[:: 7 if scale == 1 else 41]
    others_N2 = others_N2[fits(mode, scale, size, size, others_N2)]
    apart_N = separate(mode, scale, first, others_N2)
    assert apart_N.any() and not apart_N.all() and not separate(mode, scale, first, [first])[0]
    mask = painted(image, *first, mode, scale)
    for other in others_N2[apart_N]:
        other_mask = painted(image, *other, mode, scale)
        assert not (mask & other_mask).any()
        assert not mask[other[1], other[0]] and not other_mask[first[1], first[0]]


def test_text_modes_only_need_two_different_pixels():
    assert separate("text_norm", 8, (5, 7), [(5, 7), (5, 8), (4, 7)]).tolist() == [False, True, True]


@pytest.mark.parametrize(
    "mode, scale, point, margin",
    [("arrow", 1, (4, 20), 5), ("dot", 1, (20, 1), 2), ("square", 2, (33, 20), 7), ("cross", 3, (9, 20), 10)],
)
def test_marker_that_does_not_fit_is_an_error(mode, scale, point, margin):
    x, y = point
    words = rf"the {mode} does not fit\n.*point \({x}, {y}\) of an image of 40x40 px\n.*at least {margin} px from"
    with pytest.raises(InputError, match=words):
        draw(grey(40, 40), [(20, 20), point], mode, scale)


@pytest.mark.parametrize(
    "mode, one, two",
    [
        ("arrow", "the point pointed by the blue arrow", "the 2 points pointed by the blue arrows"),
        ("dot", "the point marked by the blue dot", "the 2 points marked by the blue dots"),
        ("cross", "the point marked by the blue cross", "the 2 points marked by the blue crosses"),
        ("square", "the point marked by the blue square", "the 2 points marked by the blue squares"),
        ("text_raw", "the pixel at (5, 7)", "the pixels at (5, 7) and (639, 0)"),
        ("text_norm", "the point at coordinates (17, 31)", "the points at coordinates (17, 31) and (1998, 2)"),
    ],
)
def test_places(mode, one, two):
    points_N2 = np.array([[5, 7], [639, 0]])
    assert place(mode, "blue", points_N2[:1], 640, 480) == one
    assert place(mode, "blue", points_N2, 640, 480) == two


@pytest.mark.parametrize("mode", config_rules.TEXT_MODES)
@pytest.mark.parametrize("width, height", [(1, 1), (9, 101), (640, 1200), (2500, 3)])
def test_no_point_has_a_longer_name_than_the_last_one(mode, width, height):
    points_N2 = all_pixels(width, height)[:: max(1, width * height // 2000)]
    longest = len(place(mode, "red", [(width - 1, height - 1)], width, height))
    assert max(len(place(mode, "red", [point], width, height)) for point in points_N2) <= longest


def test_notes():
    assert note("text_norm") == (
        "The coordinates are in normalised [0, 2000] format relative to image width and height."
    )
    assert {note(mode) for mode in PLACES if mode != "text_norm"} == {""}


@pytest.mark.parametrize("side", [1, 2, 7, 640, 868, 1999, 2000, 2001, 12000])
def test_normalised_coordinates_stay_in_range_and_lead_back(side):
    pixels = np.arange(side)
    cells = np.array([normalise(x, side - 1 - x, side, side) for x in range(side)])
    assert cells.min() >= 0 and cells.max() < 2000
    assert np.array_equal(cells[:, 0], np.floor((2 * pixels + 1) * 2000 / (2 * side)))
    assert np.array_equal(cells[:, 1], cells[::-1, 0])
    back = (cells[:, 0] + 0.5) / 2000 * side - 0.5
    assert np.abs(back - pixels).max() <= side / 4000 + 1e-9


def test_examples_in_the_docstrings():
    result = doctest.testmod(reference)
    assert result.failed == 0 < result.attempted
