"""Attention of a prompt in pairs of bf16: prompt_attention.py where int8 was asked for. Twin of infer/step.py.

In and out as there, float32. Queries, keys, values and powers are rounded to bf16; scores, sums of powers and results
are float32. So a result errs by about 2^-8 of the values, and the int8 products around it by about a hundredth.

One instruction multiplies 32 pairs, where float32 takes two. On a core of a Zen 4 it takes 2.7 ms for a layer of
SmolLM2-135M and 512 tokens, float32 4.2; the multiplications alone would take 1.4, exponentials 0.5.
"""

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import sums as each, vector as v, words
from qlora_lab.kernels.attention import multiply, power
from qlora_lab.kernels.compiled import parallel, run, thread_count
from qlora_lab.kernels.elements import bfloat16_of
from qlora_lab.kernels.prompt_attention import WIDE, hide, turn

EIGHT = (np.float32(0),) * 8  # queries at once; with 32 keys they fill half of the 32 vector registers


def can_attend(head_dim: int) -> bool:
    """Whether `attend` takes heads of this size, on this CPU."""
    return head_dim % WIDE == 0 and words.has_pairs()


@njit
def _round(numbers, count, pairs, place):
    """Write the first `count` numbers as bf16 into `pairs` int32 from `place` on, neighbours in one lane."""
    for i in range(0, count, 32):
        v.store(pairs, place + i // 2, words.bfloat16_words(v.load(numbers, i), v.load(numbers, i + 16)))


@njit
def _columns(keys, tile, total, row, columns):
    """WIDE keys from tile * WIDE on, as pairs (head_dim / 2, WIDE), flat; zeros behind the last one."""
    half = len(row)
    # One by one: it is done once for a key, and each key then meets up to `tokens` queries of several heads.
    for key in range(WIDE):
        position = tile * WIDE + key
        if position < total:
            _round(keys[position], 2 * half, row, 0)
        for i in range(half):
            columns[(tile * half + i) * WIDE + key] = row[i] if position < total else 0


@njit
def _pairs(values, tile, total, pairs):
    """WIDE values from tile * WIDE on, two neighbours in one lane: (WIDE / 2, head_dim), flat."""
    head_dim = values.shape[1]
    for position in range(tile * WIDE, min((tile + 1) * WIDE, total), 2):
        for i in range(0, head_dim, 16):
            both = bfloat16_of(v.load(values[position], i))
            if position + 1 < total:  # what the cache holds behind the last one may be NaN
                both = both | bfloat16_of(v.load(values[position + 1], i)) << v.splat(16)
            v.store(pairs, position // 2 * head_dim + i, both)


@njit
def _softmax(scores, seen, end, lanes, powers, place):
    """Write e^(score - largest), 0 from `seen` on, into `powers` from `place` on. Returns their sum, not rounded."""
    top = hide(scores, seen, end, lanes)
    totals = v.splat(np.float32(0))
    for i in range(0, end, 32):
        left, right = power(v.load(scores, i) + v.splat(-top)), power(v.load(scores, i + 16) + v.splat(-top))
        totals = totals + left + right  # not yet rounded, as in attention.py
        v.store(powers, place + i // 2, words.bfloat16_words(left, right))
    return each.total(totals)


@njit
def _queries(first, head, q, rotary, start, columns, values, head_dim, zeros, scratch, out):
    """As prompt_attention's: the queries of a head from `first` on, as many as `zeros`."""
    turned, rows, scores, powers, result, shares, lanes = scratch
    cos, sin = rotary
    size, room, half = len(zeros), scores.shape[1], head_dim // 2
    count = min(size, len(q) - first)
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for row in range(count):  # rows that are missing keep what they had, and are not written
        token = first + row
        # scaled before it is rounded: 1 / 8, for heads of 64, changes no bit of a bf16
        turn(q[token], head * head_dim, cos[start + token], sin[start + token], scale, turned, 0)
        _round(turned, head_dim, rows, row * half)
    seen = start + first + count  # by the last of them
    end = (seen + WIDE - 1) // WIDE * WIDE
    for i in range(0, end, WIDE):
        multiply(zeros, rows, half, columns, i * half, WIDE, half, scores, i)
    for row in range(count):
        place = row * room // 2
        shares[row] = np.float32(1) / _softmax(scores[row], start + first + row + 1, end, lanes, powers, place)
    for i in range(0, head_dim, 32):
        multiply(zeros, powers, room // 2, values, i, head_dim, (seen + 1) // 2, result, i)
    for row in range(count):
        share = v.splat(shares[row])
        for i in range(0, head_dim, 16):
            v.store(out[first + row], head * head_dim + i, v.load(result[row], i) * share)


@parallel
def _attend(q, heads, rotary, keys, values, start, zeros, parts, out):
    """All heads of q (tokens, at least heads * head_dim). keys and values: (key heads, capacity, head_dim)."""
    kv_heads, _, head_dim = keys.shape
    tokens = len(q)
    total = start + tokens
    tiles = (total + WIDE - 1) // WIDE
    columns = np.empty((kv_heads, tiles * WIDE * head_dim // 2), np.int32)
    pairs = np.empty((kv_heads, tiles * WIDE * head_dim // 2), np.int32)
    for part in prange(parts):
        row = np.empty(head_dim // 2, np.int32)
        for item in range(part, kv_heads * tiles, parts):
            head, tile = item // tiles, item % tiles
            _columns(keys[head], tile, total, row, columns[head])
            _pairs(values[head], tile, total, pairs[head])
    size = len(zeros)
    blocks = (tokens + size - 1) // size
    for part in prange(parts):
        turned, rows = np.empty(head_dim, np.float32), np.zeros(size * head_dim // 2, np.int32)
        scores, powers = np.empty((size, tiles * WIDE), np.float32), np.zeros(size * tiles * WIDE // 2, np.int32)
        result, shares = np.empty((size, head_dim), np.float32), np.empty(size, np.float32)
        scratch = turned, rows, scores, powers, result, shares, np.empty(16, np.float32)
        # the order of prompt_attention.py: each thread has early and late queries, and one head after the other
        for item in range(part, blocks * heads, parts):
            head = item // blocks
            its = head * kv_heads // heads  # key heads are shared by neighbours
            some = columns[its], pairs[its], head_dim
            _queries(item % blocks * size, head, q, rotary, start, *some, zeros, scratch, out)


def attend(q: torch.Tensor, heads: int, rotary, kept: tuple[torch.Tensor, torch.Tensor], start: int) -> torch.Tensor:
    """Return (tokens, heads * head_dim) float32. The arguments are those of prompt_attention.attend."""
    out = torch.empty(len(q), heads * kept[0].shape[2], dtype=torch.float32, device="cpu")
    arrays = [tensor.numpy() for tensor in (*rotary, *kept)]
    run(_attend, q.numpy(), heads, tuple(arrays[:2]), *arrays[2:], start, EIGHT, thread_count(), out.numpy())
    return out
