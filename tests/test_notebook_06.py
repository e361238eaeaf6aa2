"""The sweep of notebook 06: its rows come with the course, and measuring them again is the reader's choice."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qlora_lab.measure.sweep import sweep

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "notebooks" / "06_data_types.ipynb").read_text("utf-8"))["cells"]
(SWEEP,) = [source for cell in CELLS if (source := "".join(cell["source"])).startswith("measure_again = False\n")]
ROWS = json.loads((ROOT / "bench" / "data_types_rows.json").read_text("utf-8"))


def executed(source, **calls):
    names = {"Path": Path, "settings": [(None,)], "gettempdir": lambda: "folder"}
    exec(source, names | {"ql": SimpleNamespace(**calls)})
    return names


def test_nothing_is_measured_unless_the_reader_asks():
    executed(SWEEP)  # a call to ql.sweep would fail: this ql has none


def test_measuring_again_shows_a_bar():
    calls = []

    def record(*positional, **named):
        calls.append(inspect.signature(sweep).bind(*positional, **named))
        calls[0].apply_defaults()
        return ROWS

    executed(SWEEP.replace("measure_again = False", "measure_again = True"), sweep=record)
    (call,) = calls
    assert call.arguments["progress"] is True
    assert call.arguments["settings"] == [(None,)]
    assert call.arguments["results"] == Path("folder", "qlora-lab", "data_types.jsonl")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['codebook']}-{row['block_size']}-{row['double_quant']}")
def test_a_stored_row_is_whole_and_of_the_same_text(row):
    assert row["perplexity"] == pytest.approx(torch.tensor(row["window_losses"]).double().mean().exp().item())
    assert len(row["window_losses"]) == row["config"]["windows"] == 8
    assert (row["model"], row["data"]) == (ROWS[0]["model"], ROWS[0]["data"])
