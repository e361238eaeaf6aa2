"""Threads of a token: fewer while other work takes their cores, all of them when it is gone."""

import pytest

from qlora_lab.infer.thread_choice import LATEST, SOONEST, ThreadChoice

ALONE = 1.0  # seconds of a token with one thread


def answer(choice: ThreadChoice, tokens: int, free: int) -> list[int]:
    """Threads of each token with so many free cores. One too few makes a token stall; one thread waits for none."""
    counts = []
    for _ in range(tokens):
        count = choice.count
        counts.append(count)
        stalls = count > max(free, 1)
        choice.took(100 * ALONE if stalls else ALONE / count, switches=30 * stalls)
    return counts


def test_a_quiet_machine_gets_all_threads():
    assert answer(ThreadChoice(8), 500, free=8) == [8] * 500


@pytest.mark.parametrize(("free", "fewer"), [(8, 8), (7, 4), (4, 4), (3, 2), (1, 1), (0, 1)])
def test_busy_cores_are_left_to_others(free, fewer):
    counts = answer(ThreadChoice(8), 1000, free)
    assert max(set(counts), key=counts.count) == fewer
    stalled = sum(count > max(free, 1) for count in counts)
    assert stalled <= 15, "a trial of more threads comes once in LATEST tokens at most"


def test_threads_come_back_when_the_other_work_has_ended():
    choice = ThreadChoice(4)
    assert answer(choice, 2000, free=1)[-1] == 1
    counts = answer(choice, 3 * LATEST, free=4)
    assert counts[-1] == 4
    assert counts.index(4) <= LATEST + 2 * SOONEST + 2


def test_one_core_has_no_choice():
    choice = ThreadChoice(1)
    choice.took(1.0, switches=0)
    choice.took(9.0, switches=50)
    assert choice.count == 1


def test_a_token_that_compiled_says_nothing():
    choice = ThreadChoice(2)
    choice.took(20.0, switches=99)
    assert choice.count == 2
