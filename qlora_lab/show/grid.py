"""The states that a page without a kernel holds: which stops of each control, and how many controls move together.

In: the controls of an explorer. Out: a Grid, whose states are those in which at most `together` controls are away from
their start, over the stops that each control has on the page. With all controls together it is the whole product.

Stops come in rounds, from coarse to fine: a control's `rounds()`. The rule by which they are dropped to fit:
first as many controls together as fit with the coarsest stops, then finer stops for the control that has the fewest.
A control that a Play button moves keeps all its stops, or it would jump.

Not here: what fits (playable.py).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Grid:
    """rounds: for each control, its values in rounds from coarse to fine. start: a value of each in the first round.

    used: how many rounds of each are on the page. together: how many controls may be away from `start`.
    """

    rounds: tuple[tuple[tuple, ...], ...]
    start: tuple
    used: tuple[int, ...]
    together: int

    def stops(self, place: int) -> list:
        """List the values of one control on the page, ascending."""
        return sorted(itertools.chain(*self.rounds[place][: self.used[place]]))

    def __len__(self) -> int:
        """Count the states without listing them: there can be millions."""
        sums = [1] + [0] * self.together  # sums[k]: states with k controls away from the start
        for place in range(len(self.start)):
            others = len(self.stops(place)) - 1
            for k in range(self.together, 0, -1):
                sums[k] += others * sums[k - 1]
        return sum(sums)

    def __iter__(self) -> Iterator[tuple]:
        """Yield the states, the start first; neighbours differ little, which makes them small."""
        yield self.start
        yield from (state for state in self._states(0, self.together) if state != self.start)

    def _states(self, place: int, free: int) -> Iterator[tuple]:
        if place == len(self.start):
            yield ()
            return
        for value in self.stops(place) if free else [self.start[place]]:
            for rest in self._states(place + 1, free - (value != self.start[place])):
                yield (value, *rest)

    def larger(self) -> Iterator["Grid"]:
        """Yield the grids that are one step larger, the one to prefer first."""
        # two controls that move freely teach more than one with twice the stops
        if self.together < len(self.start):
            yield replace(self, together=self.together + 1)
        unfinished = [place for place, rounds in enumerate(self.rounds) if self.used[place] < len(rounds)]
        for place in sorted(unfinished, key=lambda place: len(self.stops(place))):
            used = list(self.used)
            used[place] += 1
            yield replace(self, used=tuple(used))


def smallest(rounds: list[list[list]], start: tuple, played: int | None = None) -> Grid:
    """Make the grid with the coarsest stops, with one control at a time away from its start.

    played: the number of a control that has all its stops.
    """
    used = tuple(len(each) if place == played else 1 for place, each in enumerate(rounds))
    return Grid(tuple(tuple(map(tuple, each)) for each in rounds), start, used, 1)


def halved(count: int, start: int) -> list[list[int]]:
    """Put the positions 0 to count - 1 in rounds: the start and both ends, then the middle of each gap, and so on.

    >>> halved(9, 4)
    [[0, 4, 8], [2, 6], [1, 3, 5, 7]]
    """
    known = sorted({0, start, count - 1})
    rounds = [known]
    while len(known) < count:
        gaps = zip(known, known[1:], strict=False)
        rounds.append([(low + high) // 2 for low, high in gaps if high - low > 1])
        known = sorted(known + rounds[-1])
    return rounds
