"""Blocks and bytes: round trips over drawn sizes, hand-worked bytes, refusals."""

import pytest
import torch
from hypothesis import given, strategies as st

from qlora_lab.quant.blocks import block_absmax, check_block_size, scale_blocks, to_blocks
from qlora_lab.quant.packing import group_of, pack, unpack


@given(n=st.integers(1, 300), block_size=st.integers(16, 128))
def test_blocks_hold_every_weight_and_zeros_after_it(n, block_size):
    weight = torch.arange(1.0, n + 1)
    blocks = to_blocks(weight, block_size)
    assert blocks.shape == (-(-n // block_size), block_size)
    assert torch.equal(blocks.view(-1)[:n], weight) and not blocks.view(-1)[n:].any()


def test_blocks_straddle_rows_of_any_layout():
    weight = torch.arange(96.0).view(4, 24).t()  # not contiguous: logical order counts
    assert torch.equal(to_blocks(weight, 16).view(-1), weight.reshape(-1))


def test_scaled_blocks_span_one():
    blocks = torch.tensor([[0.5, -2.0] * 8, [0.0] * 16, [1e-40] * 16])
    scaled = scale_blocks(blocks, block_absmax(blocks))
    assert scaled[0].abs().max() == 1 and not scaled[1].any()
    assert scaled[2].abs().max() < 0.02  # denormals are divided by 1e-38, not by themselves


@pytest.mark.long
@pytest.mark.parametrize("bits", range(2, 9))
@given(data=st.data())
def test_unpack_undoes_pack(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70))
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(codes, bits, fill=1)
    n_codes, n_bytes = group_of(bits)
    assert len(packed) == -(-len(codes) // n_codes) * n_bytes
    assert torch.equal(unpack(packed, len(codes), bits), codes)
    filled = unpack(packed, len(packed) // n_bytes * n_codes, bits)[len(codes) :]
    assert (filled == 1).all()


def test_bytes_by_hand():
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4, fill=7).tolist() == [0x12, 0x37]
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b01_10_11_00]
    three = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    assert pack(three, 3).tolist() == [0b001_010_01, 0b1_100_101_1, 0b10_111_000]


def test_refusals():
    with pytest.raises(ValueError, match="code 16 does not fit into 4 bits: codes go from 0 to 15"):
        pack(torch.tensor([16], dtype=torch.uint8))
    with pytest.raises(TypeError, match="torch.int64.*uint8"):
        pack(torch.tensor([1]))
    for size in (15, 4097, 0, -64):
        with pytest.raises(ValueError, match=f"block_size={size} is not allowed: choose from 16 to 4096"):
            check_block_size(size)
    for size in (64.0, "64", True):
        with pytest.raises(TypeError, match="must be a whole number"):
            check_block_size(size)
