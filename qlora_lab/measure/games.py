"""Hold the games of a tournament: two systems answer one question, and a judge that saw them in some order decides.

    games = Games.of([("q1", "nf4", "bf16", "second"), ("q1", "bf16", "nf4", "first")])
    games.systems, games.first, games.verdicts   -> ("nf4", "bf16"), array([0, 1]), array([1, 0])

Arrays of small integers, one entry a game, since thousands of replays read them; names and questions stand beside.
A verdict that could not be read is one of its own. It is never silently a tie: the rules of a rating say how it
counts.
Not here: files of games (judgments.py), games drawn at random (simulated_games.py).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

VERDICTS = ("first", "second", "tie", "unread")  # the answer that won; the index is its number in Games.verdicts
FIRST, SECOND, TIE, UNREAD = range(4)
Row = tuple[str, str, str, str]  # question, first, second, verdict


def once(placed: Iterable[tuple[str, Row]]) -> Iterator[Row]:
    """Yield the rows of a file, each given with its place, such as "games.jsonl, line 3".

    Raises ValueError, with both places, for a game that is there twice.
    """
    # Copies of a game agree with each other, so they hide a judge who contradicts himself, and narrow every interval.
    places: dict[tuple[str, str, str], str] = {}
    for place, row in placed:
        question, first, second, _ = row
        if (earlier := places.setdefault(row[:3], place)) is not place:
            game = f"the game of {first!r} against {second!r} on question {question!r}"
            raise ValueError(f"{place} holds {game} again, which is in {earlier}: keep one of them")
        yield row


def quoted(names: Iterable[str]) -> str:
    """List names in quotes: one may hold a comma, and one that is not quantised is called 'none'."""
    return ", ".join(map(repr, names))


@dataclass(frozen=True)
class Games:
    """Games as arrays of shape (n,), int64. `first` and `second`: indices into `systems`, in the order of reading."""

    systems: tuple[str, ...]
    questions: tuple[str, ...]  # empty if the source has counts alone
    question: np.ndarray  # (n,) indices into questions; all -1 if there are none
    first: np.ndarray
    second: np.ndarray
    verdicts: np.ndarray  # indices into VERDICTS

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Games":
        """Make games from rows of question, first system, second system and verdict. Raises ValueError for a bad row.

        >>> Games.of([("q1", "a", "b", "tie")]).verdicts
        array([2])
        """
        systems, questions, numbers = {}, {}, []  # name -> index: a search in a list is slow for 40,000 games
        for number, (question, first, second, verdict) in enumerate(rows, 1):
            if verdict not in VERDICTS:
                raise ValueError(f"game {number}: the verdict is {verdict!r}; allowed are {', '.join(VERDICTS)}")
            if first == second:
                raise ValueError(f"game {number}: {first!r} plays against itself: a game needs two systems")
            pair = [systems.setdefault(name, len(systems)) for name in (first, second)]
            numbers.append((questions.setdefault(question, len(questions)), *pair, VERDICTS.index(verdict)))
        table = np.array(numbers, dtype=np.int64).reshape(-1, 4)
        return cls(tuple(systems), tuple(questions), *table.T)

    @classmethod
    def of_counts(cls, rows: Iterable[tuple[str, str, Sequence[int]]]) -> "Games":
        """Make games from rows of first system, second system, and the number of each of VERDICTS.

        The games then have no questions, so nothing can pair the two orders of one question, or resample questions.
        Raises ValueError for a bad row.

        >>> Games.of_counts([("a", "b", (2, 1, 0, 0))]).verdicts
        array([0, 0, 1])
        """
        rows = list(rows)
        games = cls.of(("", first, second, "tie") for first, second, _ in rows)  # one a row, for the checks and names
        for number, (*_, counts) in enumerate(rows, 1):
            if len(counts) != len(VERDICTS) or min(counts) < 0:
                words = f"four of 0 or more are needed: of {', '.join(VERDICTS)}"
                raise ValueError(f"row {number}: the counts are {list(counts)}; {words}")
        counts = np.array([counts for *_, counts in rows], dtype=np.int64).reshape(-1, len(VERDICTS))
        verdicts = np.repeat(np.tile(np.arange(len(VERDICTS)), len(rows)), counts.ravel())
        first, second = (np.repeat(side, counts.sum(axis=1)) for side in (games.first, games.second))
        return cls(games.systems, (), np.full(len(verdicts), -1), first, second, verdicts)

    def __len__(self) -> int:
        return len(self.verdicts)

    def where(self, chosen: np.ndarray) -> "Games":
        """Return the games that a boolean array (n,) chooses. Systems and questions keep their numbers."""
        arrays = (array[chosen] for array in (self.question, self.first, self.second, self.verdicts))
        return Games(self.systems, self.questions, *arrays)

    @property
    def unread(self) -> int:
        """How many verdicts could not be read."""
        return int((self.verdicts == UNREAD).sum())
