"""docs/published.md says what the replays say."""

import pytest

from qlora_lab.measure.replay import Replay
from tools.published_page import COMMAND, PAGE, failures, page


@pytest.mark.slow
def test_the_page_is_up_to_date():
    assert PAGE.read_text("utf-8") == page(), f"run: {COMMAND}"


def test_a_failure_has_one_place_more_than_printed_and_a_reason_once():
    rows = [Replay(f"{n}", f"figure {n}", "53.1", "%", 52.98, "", "too high", "somewhere: in a box") for n in (1, 2)]
    good = Replay("3", "figure 3", "1", "", 1.0, "")
    text = failures("Title", [*rows, good])
    assert "| figure 1 | somewhere | 53.1 % | 52.98 | too high |" in text
    assert "| figure 2 | somewhere | 53.1 % | 52.98 | as above |" in text and "figure 3" not in text
