"""No byte is lost, whatever is asked for in which order; who is evicted is who was used least recently."""

import pytest
import torch
from hypothesis import given, strategies as st

from qlora_lab.finetune.paging import Event, Pages

calls_ = st.lists(st.tuples(st.sampled_from(["page", "prefetch"]), st.integers(0, 8), st.integers(0, 255)), max_size=60)


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), calls_)
def test_no_order_of_calls_loses_a_byte(count, frames, page_size, calls):
    pages = Pages(count * page_size, page_size, frames * page_size)
    known = torch.zeros(count, page_size, dtype=torch.uint8)
    used, page = 0, pages.page(0)
    for call, number, value in calls:
        if call == "prefetch":
            pages.prefetch(number % count)  # the page that was handed out stays where it is
        else:
            used, page = number % count, pages.page(number % count)
            assert len(pages.resident) <= frames and pages.resident[-1] == used
        assert torch.equal(page, known[used])
        page[value % page_size] = known[used, value % page_size] = value
    for number in range(count):
        assert torch.equal(pages.page(number), known[number])


def test_the_least_recently_used_page_is_evicted():
    pages = Pages(5 * 4096, 4096, 3 * 4096)
    for number in (0, 1, 2, 0, 3, 1):
        pages.page(number)
    assert list(pages.events) == [
        Event("fault", 0, 0), Event("fault", 1, 1), Event("fault", 2, 2),
        Event("write back", 1, 1), Event("evict", 1, 1), Event("fault", 3, 1),
        Event("write back", 2, 2), Event("evict", 2, 2), Event("fault", 1, 2),
    ]  # fmt: skip
    assert pages.resident == [0, 3, 1]


def test_without_a_budget_there_is_no_file():
    pages = Pages(10, 4)
    pages.page(2)[1] = 7
    assert pages.page(2).tolist() == [0, 7, 0, 0] and pages._store.file is None and len(pages.events) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8), "nbytes=0 and page_size=8"),
        ((8, 0), "nbytes=8 and page_size=0"),
        ((8, 8, 7), "budget=7 is not enough: it holds one page of 8 bytes at least"),
    ],
)
def test_errors_name_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pages(*arguments)


def test_a_page_that_is_not_there():
    with pytest.raises(IndexError, match="page 2 is asked for, there are 2"):
        Pages(16, 8).page(2)


def test_a_page_that_was_prefetched_is_no_fault():
    pages = Pages(4 * 8, 8, 2 * 8)
    pages.page(0)[:] = 7
    for number in (1, 2, 3):
        pages.prefetch(number)
        pages.prefetch(number)  # it is on its way
        assert pages.page(number).tolist() == [0] * 8
    pages.prefetch(0)
    pages.prefetch(2)  # in a frame, but the one that leaves it for page 0: not any more
    assert pages.page(2).tolist() == [0] * 8 and pages.page(0).tolist() == [7] * 8
    assert list(pages.events) == [
        Event("fault", 0, 0), Event("prefetch", 1, 1),
        Event("write back", 0, 0), Event("evict", 0, 0), Event("prefetch", 2, 0),
        Event("write back", 1, 1), Event("evict", 1, 1), Event("prefetch", 3, 1),
        Event("write back", 2, 0), Event("evict", 2, 0), Event("prefetch", 0, 0),
        Event("write back", 0, 0), Event("evict", 0, 0), Event("prefetch", 2, 0),
        Event("write back", 3, 1), Event("evict", 3, 1), Event("fault", 0, 1),
    ]  # fmt: skip


def test_one_frame_has_no_room_for_a_prefetch():
    pages = Pages(16, 8, 8)
    pages.page(0)
    pages.prefetch(1)
    assert list(pages.events) == [Event("fault", 0, 0)] and pages.resident == [0]


class Broken:
    """A file on a full disk, or one that something cut off."""

    def __init__(self, file, fails):
        self.file, self.fails = file, fails

    def seek(self, at):
        self.file.seek(at)

    def write(self, data):
        return len(data) // 2 if self.fails == "write" else self.file.write(data)

    def readinto(self, data):
        return 0 if self.fails == "read" else self.file.readinto(data)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("fails", "message"),
    [("write", "no space to write back page 0 of 8 bytes"), ("read", "page 1 cannot be read back whole")],
)
def test_a_disk_that_fails_loses_nothing(fails, message, ahead):
    pages = Pages(32, 8, 16)
    for number in (0, 1, 2, 3, 0, 3):
        pages.page(number)[:] = number + 1
    file = pages._store.file
    pages._store.file = Broken(file, fails)
    pages.events.clear()
    if ahead:
        pages.prefetch(1)
    for _ in range(2):  # it may be asked for again and fails again
        with pytest.raises(OSError, match=message):
            pages.page(1)
    assert [event.kind for event in pages.events] == ([] if fails == "write" else ["write back", "evict"])
    assert pages.resident == ([0, 3] if fails == "write" else [3])
    assert pages.page(3).tolist() == [4] * 8
    pages._store.file = file
    assert [pages.page(number).tolist() for number in range(4)] == [[number + 1] * 8 for number in range(4)]


def test_an_interruption_leaves_a_page_on_its_way(monkeypatch):
    pages = Pages(16, 8, 8)
    pages.page(0)[:] = 7
    start = pages._store.start

    def interrupted(move):
        wait, calls = start(move), []

        def once():
            calls.append(1)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return wait()

        return once

    monkeypatch.setattr(pages._store, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pages.page(1)
    monkeypatch.undo()
    assert pages.page(0).tolist() == [7] * 8 and pages.page(1).tolist() == [0] * 8
