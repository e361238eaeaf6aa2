"""Attention of a prompt in float32, many queries at once: softmax(q k^T / sqrt(head_dim)) v. Twin of infer/step.py.

In: queries as their product leaves them, not yet turned, and the keys and values of a layer's cache. Out: (tokens,
heads * head_dim) float32, equal to step.attend(step.rotate(q), ...) up to the order of the sums.

8 queries of a head meet 32 keys in registers, so a number that is loaded is used 8 or 32 times, and what no query of
the 8 sees is left out. A row of scores is whole before its softmax, which so needs one pass. Heads that share keys read
the same copy of them. On a core of a Zen 4 it takes 4 ms for a layer of SmolLM2-135M and 512 tokens,
torch's routine 9; the multiplications alone would take 2.6.
"""

from functools import lru_cache

import numpy as np
import torch
from numba import njit, prange

from qlora_lab.kernels import sums as each, vector as v
from qlora_lab.kernels.attention import multiply, power
from qlora_lab.kernels.compiled import parallel, run, thread_count

WIDE = 32  # keys, or numbers of a head, that are added up together: two vectors
QUERIES = 8  # at once: their sums fill half of 32 registers
QUERIES_OF_16 = 3  # where there are 16 registers of half the width
_INFINITY = np.float32(np.inf)


@lru_cache  # asking for the CPU's features takes a quarter of a millisecond
def _zeros():
    """A tuple, so that sums are registers and not an array: one for each query."""
    return (np.float32(0),) * (QUERIES if "avx512f" in v.host_features() else QUERIES_OF_16)


def can_attend(head_dim: int) -> bool:
    """Whether `attend` takes heads of this size, on this CPU."""
    return head_dim % WIDE == 0 and v.is_fast()


@njit
def turn(vector, start, cos, sin, scale, out, place):
    """Write a head's vector, turned by its position and scaled, into `out` from `place` on."""
    half = len(cos) // 2
    scales = v.splat(scale)
    for i in range(0, half, 16):
        left, right = v.load(vector, start + i) * scales, v.load(vector, start + half + i) * scales
        minus = right * v.load(sin, i) * v.splat(np.float32(-1))
        v.store(out, place + i, v.fma(left, v.load(cos, i), minus))
        v.store(out, place + half + i, v.fma(right, v.load(cos, half + i), left * v.load(sin, half + i)))


@njit
def _columns(keys, tile, total, columns):
    """WIDE keys from tile * WIDE on, as (head_dim, WIDE), flat; zeros behind the last one.

    Each tile lies alone: as a part of longer rows, its numbers would be a power of two apart, and share a few lines of
    the first-level cache.
    """
    head_dim = keys.shape[1]
    for key in range(WIDE):
        position = tile * WIDE + key
        for i in range(head_dim):
            columns[(tile * head_dim + i) * WIDE + key] = keys[position, i] if position < total else np.float32(0)


@njit
def hide(scores, seen, end, lanes):
    """Set scores from `seen` on to -inf, and return the largest of all. lanes: room for 16."""
    for i in range(seen, end):
        scores[i] = -_INFINITY
    tops = v.splat(-_INFINITY)
    for i in range(0, end, 16):
        tops = v.clamp(v.load(scores, i), tops, v.splat(_INFINITY))  # the larger of the two
    v.store(lanes, 0, tops)
    top = lanes[0]
    for lane in lanes:
        top = max(top, lane)
    return top


@njit
def _softmax(scores, seen, end, lanes):
    """Replace scores by e^(score - largest), and by 0 from `seen` on. Returns their sum."""
    top = hide(scores, seen, end, lanes)
    totals = v.splat(np.float32(0))
    for i in range(0, end, 16):
        powers = power(v.load(scores, i) + v.splat(-top))
        totals = totals + powers
        v.store(scores, i, powers)
    return each.total(totals)


@njit
def _queries(first, head, q, rotary, start, columns, values, zeros, scratch, out):
    """The queries of a head from `first` on, as many as `zeros`. start: position of the first query of all."""
    rows, scores, result, shares, lanes = scratch
    cos, sin = rotary
    size, room, head_dim = len(zeros), scores.shape[1], values.shape[1]
    count = min(size, len(q) - first)
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    for row in range(count):  # rows that are missing keep what they had, and are not written
        token = first + row
        turn(q[token], head * head_dim, cos[start + token], sin[start + token], scale, rows, row * head_dim)
    seen = start + first + count  # by the last of them
    end = (seen + WIDE - 1) // WIDE * WIDE
    for i in range(0, end, WIDE):
        multiply(zeros, rows, head_dim, columns, i * head_dim, WIDE, head_dim, scores, i)
    flat = scores.reshape(-1)
    for row in range(count):
        shares[row] = np.float32(1) / _softmax(scores[row], start + first + row + 1, end, lanes)
    for i in range(0, head_dim, WIDE):
        multiply(zeros, flat, room, values.reshape(-1), i, head_dim, seen, result, i)
    for row in range(count):
        share = v.splat(shares[row])
        for i in range(0, head_dim, 16):
            v.store(out[first + row], head * head_dim + i, v.load(result[row], i) * share)


@parallel
def _put(found, rotary, start, keys, values):
    """Keys, turned, and values into the cache; found: (tokens, n), which ends with both."""
    kv_heads, _, head_dim = keys.shape
    cos, sin = rotary
    for token in prange(len(found)):
        row, position = found[token], start + token
        for head in range(kv_heads):
            first = len(row) - (2 * kv_heads - head) * head_dim
            turn(row, first, cos[position], sin[position], np.float32(1), keys[head, position], 0)
            for i in range(head_dim):
                values[head, position, i] = row[first + kv_heads * head_dim + i]


@parallel
def _attend(q, heads, rotary, keys, values, start, zeros, parts, out):
    """All heads of q (tokens, at least heads * head_dim). keys and values: (key heads, capacity, head_dim)."""
    kv_heads, _, head_dim = keys.shape
    tokens = len(q)
    total = start + tokens
    tiles = (total + WIDE - 1) // WIDE
    columns = np.empty((kv_heads, tiles * head_dim * WIDE), np.float32)
    for part in prange(parts):
        for item in range(part, kv_heads * tiles, parts):
            _columns(keys[item // tiles], item % tiles, total, columns[item // tiles])
    size = len(zeros)
    blocks = (tokens + size - 1) // size
    for part in prange(parts):
        rows = np.zeros(size * head_dim, np.float32)
        scores = np.zeros((size, tiles * WIDE), np.float32)
        result = np.empty((size, head_dim), np.float32)
        shares, lanes = np.empty(size, np.float32), np.empty(16, np.float32)
        scratch = rows, scores, result, shares, lanes
        # Later queries see more keys: so a thread takes every parts-th item, and not a run of them.
        for item in range(part, blocks * heads, parts):
            head = item // blocks  # one after the other: the keys and values of one stay in the second-level cache
            its = head * kv_heads // heads  # key heads are shared by neighbours
            first = item % blocks * size
            _queries(first, head, q, rotary, start, columns[its], values[its], zeros, scratch, out)


def put(found: torch.Tensor, rotary, kept: tuple[torch.Tensor, torch.Tensor], start: int) -> None:
    """Turn the keys of `found` (tokens, n), which ends with keys and values, and write both into a layer's cache.

    The other arguments are those of `attend`.
    """
    run(_put, found.numpy(), tuple(t.numpy() for t in rotary), start, *(t.numpy() for t in kept))


def attend(q: torch.Tensor, heads: int, rotary, kept: tuple[torch.Tensor, torch.Tensor], start: int) -> torch.Tensor:
    """Return (tokens, heads * head_dim) for q (tokens, at least heads * head_dim), whose first numbers are the queries.

    rotary: cosines and sines, (positions, head_dim). kept: keys, turned, and values, (key heads, capacity, head_dim);
    the first start + tokens are read. start: the position of the first query. All are float32 and contiguous.
    """
    out = torch.empty(len(q), heads * kept[0].shape[2], dtype=torch.float32, device="cpu")
    arrays = [tensor.numpy() for tensor in (*rotary, *kept)]
    run(_attend, q.numpy(), heads, tuple(arrays[:2]), *arrays[2:], start, _zeros(), thread_count(), out.numpy())
    return out
