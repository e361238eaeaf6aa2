"""Which states a page holds: counted without a list, nested as it grows, and never one that a control has not."""

import pytest
from hypothesis import given, strategies as st

from qlora_lab.show.grid import halved, smallest

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def grown(sizes, steps):
    """A grid over 0 to n - 1 for each size, some steps larger."""
    grid = smallest([halved(n, n // 3) for n in sizes], tuple(n // 3 for n in sizes))
    for _ in range(steps):
        grid = next(grid.larger(), grid)
    return grid


@pytest.mark.long
@given(SIZES, st.integers(0, 12))
def test_states_are_counted_as_they_are_listed(sizes, steps):
    grid = grown(sizes, steps)
    states = list(grid)
    assert len(states) == len(set(states)) == len(grid)
    assert states[0] == grid.start
    away = [sum(a != b for a, b in zip(state, grid.start, strict=True)) for state in states]
    assert max(away) <= grid.together
    assert all(0 <= value < n for state in states for value, n in zip(state, sizes, strict=True))


@pytest.mark.long
@given(SIZES, st.integers(0, 12))
def test_a_larger_grid_keeps_the_states_of_a_smaller_one(sizes, steps):
    assert set(grown(sizes, steps)) <= set(grown(sizes, steps + 1))


@pytest.mark.long
@given(SIZES)
def test_the_largest_grid_is_the_whole_product(sizes):
    product = 1
    for n in sizes:
        product *= n
    assert len(grown(sizes, 100)) == product


@pytest.mark.long
@given(st.integers(1, 300), st.data())
def test_rounds_hold_each_position_once(count, data):
    start = data.draw(st.integers(0, count - 1))
    rounds = halved(count, start)
    assert sorted(sum(rounds, [])) == list(range(count))
    assert {0, start, count - 1} == set(rounds[0])


def test_more_controls_come_before_finer_stops_and_then_the_control_with_the_fewest():
    grid = smallest([halved(9, 0), halved(5, 2)], (0, 2))
    assert [grid.stops(0), grid.stops(1), grid.together] == [[0, 8], [0, 2, 4], 1]
    grid = next(grid.larger())
    assert [len(grid), grid.together, grid.used] == [6, 2, (1, 1)]
    assert next(grid.larger()).used == (2, 1)


def test_what_is_played_keeps_its_stops():
    grid = smallest([halved(9, 0), halved(5, 2)], (0, 2), played=0)
    assert (grid.stops(0), grid.stops(1)) == (list(range(9)), [0, 2, 4])
