"""No byte is lost, whatever is asked for in which order; who is evicted is who was used least recently."""

import pytest
import torch
from hypothesis import given, strategies as st

from qlora_lab.finetune.paging import Event, Pages

accesses_ = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 255)))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40), accesses_)
def test_no_access_order_loses_a_byte(count, frames, page_size, accesses):
    pages = Pages(count * page_size, page_size, frames * page_size)
    known = torch.zeros(count, page_size, dtype=torch.uint8)
    for number, value in accesses:
        number %= count
        page = pages.page(number)
        assert torch.equal(page, known[number])
        page[value % page_size] = known[number, value % page_size] = value
        assert len(pages.resident) <= frames and pages.resident[-1] == number
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
    assert pages.page(2).tolist() == [0, 7, 0, 0] and pages._file is None and len(pages.events) == 1


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


def test_a_full_disk_loses_nothing():
    class Full:
        def seek(self, at):
            pass

        def write(self, data):
            return len(data) // 2

    pages = Pages(24, 8, 8)
    pages.page(0)[:] = 7
    file, pages._file = pages._file, Full()
    with pytest.raises(OSError, match="no space to write back page 0 of 8 bytes"):
        pages.page(1)
    assert pages.resident == [0] and pages.page(0).tolist() == [7] * 8
    pages._file = file
    pages.page(1)
    assert pages.page(0).tolist() == [7] * 8
