"""How many threads compute the next token: all, or fewer while other work takes their cores.

In: how long each token took, and how often the system took a core away meanwhile. Out: a number of threads.

The threads of a token wait for each other 150 times in SmolLM2. Where other work holds a core of theirs, each of these
waits can last until the scheduler comes round, some milliseconds: with two threads a token then took over 100 times as
long as with one. So when a token is interrupted, the next ones get half of the threads, until one is not; the shorter
of first and last wins, and later more are tried again. No logit depends on the number (tests/infer/test_step.py).
"""

SOONEST, LATEST = 16, 256  # tokens until another number is tried; after each trial that was lost, twice as many


class ThreadChoice:
    """The number of threads for the next token, in `count`; `took` is told about each one.

    >>> choice = ThreadChoice(4)
    >>> choice.took(5.0, switches=9)  # the first token may compile the kernel
    >>> choice.took(0.9, switches=30)  # a busy machine
    >>> choice.count
    2
    >>> choice.took(0.1, switches=1)  # it was right to take fewer
    >>> choice.count
    2
    """

    def __init__(self, most: int):
        self.count = most
        self._most = most
        self._pause = SOONEST
        self._left = 1  # tokens until another number may be tried: the first one may load or compile the kernel
        self._rival: tuple[int, float] | None = None  # threads and seconds of a token, while another number is tried

    def took(self, seconds: float, switches: int) -> None:
        """Note a token: its seconds, and the involuntary context switches of this process meanwhile."""
        crowded = self.count > 1 and switches >= self.count
        if self._rival is not None:
            if crowded and self.count < self._rival[0]:
                self.count //= 2  # this one was interrupted as well
            else:
                self._decide(seconds)
        elif self._left > 0:
            self._left -= 1
        elif crowded:
            self._try(self.count // 2, seconds)
        elif self.count < self._most:
            self._try(min(2 * self.count, self._most), seconds)

    def _try(self, count: int, seconds: float) -> None:
        self._rival = self.count, seconds
        self.count = count

    def _decide(self, seconds: float) -> None:
        count, rival_seconds = self._rival
        lost = seconds >= rival_seconds
        if lost:
            self.count = count
        self._pause = min(2 * self._pause, LATEST) if lost else SOONEST
        self._left = self._pause
        self._rival = None
