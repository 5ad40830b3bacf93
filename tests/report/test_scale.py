import math
from itertools import pairwise

import pytest

from optuna_greedyhg.report.scale import Scale, log_ticks
from optuna_greedyhg.report.theme import short, text


def test_outliers_on_the_bad_side_are_left_out_and_drawn_at_the_edge():
    scale = Scale.around([0.5, 0.6, 0.7, 0.8, 0.55, 0.65, 1e30])
    assert (scale.low, scale.high, scale.log) == (0.5, 0.8, False)
    assert [scale.shown(y) for y in (0.6, 1e30, None)] == [0.6, 0.8, 0.8]
    assert [scale.holds(y) for y in (0.6, 1e30, None)] == [True, False, False]


@pytest.mark.parametrize(("maximize", "low", "high"), [(False, -50.0, 3.0), (True, 0.0, 50.0)])
def test_the_best_value_is_always_inside_however_far_it_is(maximize, low, high):
    sign = 1 if maximize else -1
    values = [0.0, 1.0, 2.0, 3.0, 1.5, 1.2, sign * 50.0, -sign * 50.0]
    scale = Scale.around(values, maximize)
    assert (scale.low, scale.high) == (low, high)
    assert scale.shown(None) == (low if maximize else high)


def test_a_wide_range_of_positive_values_is_logarithmic_and_has_its_air_in_decades():
    axis = Scale.around([0.01, 0.1, 1.0]).axis()
    assert axis["type"] == "log"
    assert axis["range"] == pytest.approx([-2.12, 0.12])
    assert Scale.around([0.0, 0.1, 1.0]).axis()["type"] == "linear"


@pytest.mark.parametrize("values", [[], [0.5], [0.0, 0.0], [-1.0, -1.0]])
def test_no_range_is_empty(values):
    low, high = Scale.around(values).axis()["range"]
    assert low < high


@pytest.mark.parametrize("values", [[0.037, 0.06], [1e-6, 1e-2], [1e-12, 1e3], [0.1, 0.1], [0.1234], [3e-5, 1.2e-4]])
def test_logarithmic_ticks_are_few_and_near_the_values(values):
    ticks = log_ticks(values)["tickvals"]
    assert 1 <= len(ticks) <= 6
    assert all(0.9 * min(values) <= x <= 1.1 * max(values) for x in ticks)


@pytest.mark.parametrize("ratio", [1.3, 2.0, 2.9, 3.5, 5.0, 7.3, 10.0, 40.0, 1e4, 1e9])
@pytest.mark.parametrize("low", [1e-5, 1.7e-4, 0.29, 0.55])
def test_logarithmic_ticks_do_not_touch_on_a_low_panel(low, ratio):
    ticks = log_ticks([low, ratio * low])["tickvals"]
    assert len(ticks) >= 2 or ratio < 3
    assert all(math.log(b / a) > math.log(ratio) / 8 for a, b in pairwise(ticks))


def test_ticks_say_their_value():
    axis = log_ticks([6e-5, 1.2e-4])
    assert axis["ticktext"][-2:] == ["1e-4", "1.2e-4"]
    assert [float(words) for words in axis["ticktext"]] == axis["tickvals"]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (12345, "12.3k"),
        (999_600, "1.00M"),
        (1_840_000, "1.84M"),
        (4e9, "4.00G"),
    ],
)
def test_counts_have_three_digits(count, words):
    assert short(count) == words


def test_text_is_escaped_after_it_was_cut():
    assert text("<" * 100, length=3) == "&lt;&lt;…"
    assert text(1 / 3) == "0.333333"
