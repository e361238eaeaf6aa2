"""The X-ray explorer: what it shows is what the library decodes."""

import pytest
import torch
from safetensors.torch import save_file
from toy_checkpoint import ODD, SMALL, toy_checkpoint

from qlora_lab.export.xray import Checkpoint, byte_at, values
from qlora_lab.quant.double_quant import dynamic_map
from qlora_lab.quant.quantize import quantize
from qlora_lab.quant.serialize import to_tensors
from qlora_lab.show.figure import IN_DETAIL
from qlora_lab.show.hex_page import N_BYTES, HexPage
from qlora_lab.show.xray import XrayExplorer


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    return XrayExplorer(toy_checkpoint(tmp_path_factory.mktemp("toy")))


@pytest.mark.long
def test_every_byte_of_a_page(explorer):
    checkpoint = explorer.checkpoint
    explorer.set(tensor="k", place=0, byte=0)
    page = explorer._controls["byte"]
    assert page.contents == [f"{byte:02x}" for byte in checkpoint.read_bytes(SMALL, 0, 64)]
    assert page.together == list(range(16))  # 32 weights
    weights = values(checkpoint, SMALL, 0, 192).tolist()
    for i in (0, 7, 31, 63):
        explorer.set(byte=i)
        found = explorer.result["byte"]
        assert found == byte_at(checkpoint, SMALL, i)
        assert [half.value for half in found.halves] == weights[2 * i : 2 * i + 2]
        start, stop = explorer.result["block"]
        assert (start, stop) == (2 * i // 32 * 32, 2 * i // 32 * 32 + 32)
        inside = [level * found.halves[0].constant for level in explorer.result["inside"]]
        assert inside == pytest.approx(weights[start:stop], rel=1e-6)  # products in float64 here
        assert list(explorer.marks[1].get_data()[1]) == [found.halves[1].level]
    assert (page.value, page.together) == (63, list(range(48, 64)))


def test_the_sentence(explorer):
    explorer.set(tensor="v", place=0, byte=3)
    byte = byte_at(explorer.checkpoint, ODD, 3)
    high, low = byte.halves
    line, _, details = explorer.summary().partition(IN_DETAIL)
    assert line == (
        f"v, byte 3, at {byte.at:,} in the file, is 0x{byte.value:02x}: code {high.code}, weight (0, 6) = "
        f"{high.value:.4g}; code {low.code}, weight (0, 7) = {low.value:.4g}"
    )
    value = dynamic_map()[high.constant_code]
    assert details.startswith(
        f"high half level {high.level:.4f} x {high.constant:.4g} of block 0, constant by code {high.constant_code}: "
        f"{value:.4g} x scale {high.scale:.4g} of group 0 + offset "
    )
    assert f"; low half level {low.level:.4f} x {low.constant:.4g} of block 0, " in details
    assert explorer.code() == "XrayExplorer(checkpoint, tensor='v', place=0, byte=3)"
    texts = [text.get_text() for text in explorer.texts[0]]
    assert texts[:2] == [f"{high.code:04b}", f"{high.code}"] and texts[-1] == f"0: {high.constant_code}"


def test_padding_and_what_lies_behind_the_last_byte(explorer):
    explorer.set(tensor="v", place=100, byte=60)
    line, _, details = explorer.summary().partition(IN_DETAIL)
    assert line.endswith(f"; code {explorer.result['byte'].halves[1].code}, padding")
    assert details.endswith("; low half padding")
    assert [text.get_text() for text in explorer.texts[1]][3:5] == ["", "padding"]
    assert list(explorer.marks[1].get_data()[0]) == []
    explorer.set(byte=61)
    assert explorer.summary() == "v, byte 61: no byte is there, the last is 60"
    assert explorer._controls["byte"].contents[60:] == [f"{explorer.checkpoint.packed(ODD, 60, 61).item():02x}"] + 3 * [
        ""
    ]


def test_a_place_is_the_start_of_a_page(explorer):
    for place, first in ((0, 0), (66, 0), (67, 64), (100, 64)):
        explorer.set(tensor="k", place=place, byte=0)
        assert explorer.result["first"] == first == explorer._controls["byte"].first


@pytest.mark.long
def test_equal_states_are_equal_pictures(explorer):
    explorer.set(tensor="k", place=67, byte=9)
    other = XrayExplorer(explorer.checkpoint, tensor="k", place=67, byte=9)
    assert other.png == explorer.png and other.summary() == explorer.summary()


def test_a_click_in_the_browser_moves_everything(explorer):
    explorer.reset()
    before = explorer.png
    explorer._controls["byte"].set_state({"value": 40})
    assert explorer.png != before and "byte 40," in explorer._pane.alt


@pytest.mark.parametrize("value", [-1, N_BYTES, True, 1.0, "3", None])
def test_a_position_that_is_not_on_the_page_is_refused(value):
    with pytest.raises(ValueError, match="Byte=.* is not allowed: give a whole number from 0 to 63"):
        HexPage("Byte", value)


@pytest.mark.slow
def test_names_on_the_slider(explorer, tmp_path):
    assert explorer.keys == {"k": SMALL, "v": ODD}
    save_file(to_tensors(quantize(torch.ones(4, 8)), "w"), tmp_path / "one")
    assert list(XrayExplorer(Checkpoint(tmp_path / "one")).keys) == ["w"]


def test_a_checkpoint_without_sixteen_levels_is_refused(tmp_path):
    save_file(to_tensors(quantize(torch.ones(4, 8), "nf3"), "w"), tmp_path / "three")
    with pytest.raises(ValueError, match="holds no tensor with sixteen levels, so there is no byte to explain"):
        XrayExplorer(Checkpoint(tmp_path / "three"))
