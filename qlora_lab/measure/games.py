"""Hold the games of a tournament: two systems answer one question, and a judge who saw them in some order decides.

    games = Games.of([("q1", "nf4", "bf16", "second"), ("q1", "bf16", "nf4", "first")])
    games.systems, games.first, games.verdicts   -> ("nf4", "bf16"), array([0, 1]), array([1, 0])

Arrays of small integers, one entry a game, since thousands of replays read them; names and questions stand beside.
A verdict that could not be read is one of its own. It is never a tie in silence: whoever rates the games says what
becomes of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

VERDICTS = ("first", "second", "tie", "unread")  # the answer that won; the index is its number in Games.verdicts


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
    def of(cls, rows: Iterable[tuple[str, str, str, str]]) -> "Games":
        """Make games from rows of question, first system, second system and verdict. Raises ValueError for a bad row.

        >>> Games.of([("q1", "a", "b", "tie")]).verdicts
        array([2])
        """
        rows = list(rows)
        for number, (_, first, second, verdict) in enumerate(rows, 1):
            if verdict not in VERDICTS:
                raise ValueError(f"game {number}: the verdict is {verdict!r}; allowed are {', '.join(VERDICTS)}")
            if first == second:
                raise ValueError(f"game {number}: {first!r} plays against itself: a game needs two systems")
        systems = tuple(dict.fromkeys(name for _, *pair, _ in rows for name in pair))
        questions = tuple(dict.fromkeys(row[0] for row in rows))
        table = np.array(
            [
                (questions.index(q), systems.index(first), systems.index(second), VERDICTS.index(verdict))
                for q, first, second, verdict in rows
            ],
            dtype=np.int64,
        ).reshape(-1, 4)
        return cls(systems, questions, *table.T)

    def __len__(self) -> int:
        return len(self.verdicts)
