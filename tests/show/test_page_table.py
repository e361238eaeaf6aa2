"""The page table: what it draws is where the real Pages have each page, in any state."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.memory.paging_trace import LLAMA_7B, adapter, faults_of_a_step
from qlora_lab.optim.paging import Pages
from qlora_lab.show import page_table
from qlora_lab.show.page_table import FAULT, FILE, FRAME, HIT, LEAVES, ZERO, PageTableExplorer

EXPLORER = PageTableExplorer()
STATES = st.fixed_dictionaries(
    {name: st.sampled_from(control.choices) for name, control in EXPLORER._controls.items()}
    | {"page_size": st.sampled_from([2, 4, 8])}  # below, Pages take a while
)


def kinds(explorer: PageTableExplorer) -> np.ndarray:
    return explorer.pages.image.get_array().compressed()


@pytest.mark.long
@settings(max_examples=8)
@given(STATES)
def test_any_state_is_that_of_pages(state):
    EXPLORER.set(**state)
    result, drawn = EXPLORER.result, kinds(EXPLORER)
    count, frames = result["pages"], result["frames"]
    pages = Pages(count, 1, frames)
    for i in range(round(state["time"] * count)):
        pages.events.clear()
        pages.page(i % count)
    now = {event.kind: event.page for event in pages.events}
    assert list(result["table"]) == pages.resident and len(drawn) == count
    assert (drawn == FAULT).nonzero()[0].tolist() == [now[kind] for kind in ("fault",) if kind in now]
    assert (drawn == LEAVES).nonzero()[0].tolist() == [now[kind] for kind in ("evict",) if kind in now]
    resident = np.isin(drawn, (FRAME, HIT, FAULT)).nonzero()[0]
    assert resident.tolist() == sorted(pages.resident)
    assert (drawn == ZERO).sum() == max(0, count - round(state["time"] * count))
    assert EXPLORER.frames.image.get_array().count() == len(pages.resident)


@pytest.mark.slow
def test_one_frame_less_is_as_bad_as_half():
    all_, one_less, half = (PageTableExplorer(budget=budget) for budget in (320, 304, 160))
    assert [e.result["frames"] for e in (all_, one_less, half)] == [153, 152, 80]
    assert [e.result["faults"] for e in (all_, one_less, half)] == [0, 153, 153]
    assert (kinds(all_) == HIT).sum() == 1 and (kinds(one_less) == FILE).sum() == 0  # the one page now leaves


@pytest.mark.long
def test_the_sentence():
    assert PageTableExplorer().summary() == (
        "At time 1.4 page 60 is asked for, a fault, and page 85 leaves; 153 faults in each step after the first. In "
        "detail: LLaMA-7B, r=16, moments of 32 bits: 305.0 MiB of state in 153 pages of 2 MiB, a budget of 256 MiB "
        "with 128 frames; each later step moves 612 MiB, and nothing is fetched ahead; "
        "bitsandbytes can page 42 % of the "
        "state"
    )
    assert 8 * sum(adapter(LLAMA_7B, 16)) == 305 * 2**20


def test_nothing_has_happened_at_time_0():
    explorer = PageTableExplorer(time=0.0)
    assert "At time 0 nothing has been asked for" in explorer.summary()
    assert not any(len(mark.get_xdata()) for mark in (*explorer.marks.values(), explorer.used))
    assert set(kinds(explorer)) == {ZERO} and explorer.frames.image.get_array().count() == 0


@pytest.mark.long
def test_a_single_page():
    explorer = PageTableExplorer(r=1, bits=8, page_size=8)
    assert "; 0 faults in each step after the first. " in explorer.summary()
    assert "in 1 page of 8 MiB, a budget of 256 MiB with 1 frame; each later step moves 0 MiB" in explorer.summary()
    assert explorer.frames.image.get_array().compressed().tolist() == [1]


def test_marks_lie_in_their_cells():
    explorer = PageTableExplorer()
    columns, rows = explorer.pages.columns, explorer.pages.rows
    for kind in (FAULT, LEAVES):
        (x,), (y,) = explorer.marks[kind].get_data()
        assert explorer.pages.image.get_array()[int(y * rows), int(x * columns)] == kind
        assert (x * columns % 1, y * rows % 1) == pytest.approx((0.5, 0.5))
    assert len(explorer.marks[HIT].get_xdata()) == 0
    ages, last = explorer.frames.image.get_array().compressed(), explorer.result["last"]
    assert ages[last.frame] == 1 and ages[explorer.result["table"][last.evicted + 1]] == 0  # which leaves next


def test_each_kind_has_its_number():
    assert list(page_table.KINDS)[FILE] == "in the file" and list(page_table.KINDS)[LEAVES] == "leaves for it"


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match=r"bits=16 is not allowed: one of 8, 32\. Nearest"):
        PageTableExplorer(bits=16)


def test_the_cliff_is_where_faults_end():
    """Every budget below a frame for each page costs all faults: counted, frame by frame."""
    for pages in (1, 2, 7):
        assert [faults_of_a_step(range(pages), frames) for frames in range(1, pages + 1)] == [pages] * (pages - 1) + [0]
    explorer = PageTableExplorer()
    for budget, height in ((304, 100), (320, 0)):  # 152 and 153 frames
        explorer.set(budget=budget)
        x, y = explorer.cliff.get_data()
        assert (max(x), list(y)) == (budget, [100, 100, height, height])
        assert x[1] == (306 if height == 0 else budget)  # MiB of 153 pages
        assert (*explorer.here.get_data()[0], *explorer.here.get_data()[1]) == (budget, height)


def test_rows_are_numbered():
    grid = PageTableExplorer().frames  # 128 frames, 12 in a row
    numbers = [(text.get_text(), round(text.get_position()[1] * grid.rows - 0.5)) for text in grid.numbers]
    assert numbers[:11] == [(str(12 * row), row) for row in range(11)]
    assert {text for text, _ in numbers[11:]} == {""}
