"""The likely mistakes in the exercises of notebook 02, and what to say about each; in the way of hints.py."""

import torch

from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.packing import pack, unpack

WITHOUT = {
    "my_pack": ("quant.packing.pack",),
    "my_low_first": ("quant.packing.unpack",),
    "my_weight": ("quant.quantize.dequantize", "quant.packing.unpack"),
}


def my_pack(codes):
    """Write 3 and 10 in binary, side by side. How far does the first one move, and how do you fill an odd end?"""
    filled = torch.nn.functional.pad(codes, (0, len(codes) % 2), value=7)
    first, second = filled[0::2], filled[1::2]
    yield first | second << 4, "The halves are swapped. Which code lies in the high half?"
    yield pack(codes), "You fill an odd end with 0. Which code of NF4 is the level 0?"
    yield pack(codes, fill=15), "You fill an odd end with 15. Which code of NF4 is the level 0?"
    yield first << 3 | second, "You move by three places. How many bits does a code have?"
    yield first | second, "Both codes lie in the low half. Which one moves?"
    even = codes[: len(codes) // 2 * 2]
    yield pack(even), "The last code is lost. What does it share its byte with?"
    yield codes, "You give each code a byte of its own."
    yield pack(codes, fill=7).int(), "The bytes are right. What dtype does a byte have?"


def my_low_first(packed, numel):
    """A byte holds two codes. Take both out, and put them in a row: low, high, low, high."""
    low, high = packed & 15, packed >> 4
    yield unpack(packed, numel), "The halves are swapped. Which one comes first here?"
    yield torch.cat([low, high])[:numel], "All low halves come first. Which weights are neighbours?"
    yield torch.stack([low, high], dim=1).flatten(), "One code too many: the last half may be padding."
    yield low[:numel], "These are the low halves alone."
    yield high[:numel], "These are the high halves alone."
    yield torch.stack([low, packed], dim=1).flatten()[:numel], "What is left of a byte once its low half is gone?"
    yield torch.stack([low, high], dim=1), "These are pairs. How do they become one row?"


def my_weight(packed, absmax, shape, row, column):
    """Number the weights row by row. Which byte, which half, which level, and the constant of which block?"""
    number = row * shape[1] + column
    right = _value(packed, absmax, number)
    level = right / absmax[number // 64].item()
    yield level, "That is the level. By what was the weight divided?"
    yield _value(packed, absmax, number ^ 1), "That is the neighbour in the same byte. Which half is yours?"
    yield level * absmax[row].item(), "You use one constant for each row. How many weights share one?"
    yield level * absmax[number // 2 // 64].item(), "You count blocks in bytes. How many weights are in a block?"
    yield level * absmax[0].item(), "You use the first constant. In which block is this weight?"
    across = min(column * shape[0] + row, 2 * len(packed) - 1)
    yield _value(packed, absmax, across), "You count down the columns. In which order are the weights stored?"
    yield _value(packed, absmax, column), "You look at the first row. How many weights lie above yours?"
    code = _code(packed, number)
    yield code, "That is the code. Which level does it stand for?"
    yield code * absmax[number // 64].item(), "You multiply the code. Which level does it stand for?"


def _code(packed, number):
    return int(packed[number // 2]) >> (0 if number % 2 else 4) & 15


def _value(packed, absmax, number):
    return (codebook("nf4")[_code(packed, number)] * absmax[min(number // 64, len(absmax) - 1)]).item()
