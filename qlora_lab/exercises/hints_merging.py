"""The hints for the exercises of notebook 13, in the form that hints.py describes."""

import torch

from qlora_lab.quant.codebook import nearest_codes

WITHOUT = {
    "my_merge": ("quant.quantize.quantize", "quant.quantize.quantize_blocks", "quant.codebook.nearest_codes"),
}


def my_merge(levels, codes, absmax, change):
    """Where is the midpoint on either side of each weight, and on which side of it does the sum lie?"""
    weights = levels[codes]
    gaps = levels.diff()
    up = gaps[codes.clamp(max=len(gaps) - 1)]
    down = gaps[(codes - 1).clamp(min=0)]
    right = _nearest(levels, weights + change / absmax)
    yield _nearest(levels, weights + change), "Levels are shares of absmax. In which unit is the change?"
    moved = (change > absmax * up).long() - (change < -absmax * down).long()
    yield codes + moved, "You ask for a whole gap. How far is it to the midpoint?"
    yield right.maximum(codes), "Your weights move up only. Does a negative change move one down?"
    yield codes + change.sign().long(), "You move each weight. Which changes reach a midpoint?"
    yield codes, "Your codes are the old ones. Which changes reach a midpoint?"
    yield absmax * levels[right], "These are the weights after it. Which codes do they have?"
    yield right != codes, "You say which weights move. Which codes do they move to?"


def _nearest(levels, scaled):
    return nearest_codes(scaled, levels).to(torch.int64)


def my_zero(scale, zero, shift):
    """Write `scale * (code - new) = scale * (code - zero) + shift`, and solve it for `new`."""
    yield zero + shift / scale, "The zero point is subtracted. Does a larger one make a weight larger?"
    yield zero - shift, "A zero point counts in codes. How large is one step of a code?"
    yield zero + shift, "A zero point counts in codes, and it is subtracted."
    yield zero - shift * scale, "You multiply. How many steps of `scale` make up the shift?"
    yield -shift / scale, "That is the change of the zero point. What is it added to?"
    yield zero, "These are the old ones. Where did the shift go?"
