"""The kernels of a prompt beside their twins: attention and products in float32, and what stands between products."""

import numpy as np
import pytest
import torch

from qlora_lab.infer import int8, step as readable
from qlora_lab.kernels import (
    float_products,
    int8_products,
    prompt_attention,
    prompt_gate,
    prompt_pairs,
    prompt_rows,
    vector,
    words,
)
from qlora_lab.quant.quantize import dequantize, quantize

pytestmark = [
    pytest.mark.long,  # compiles for seconds
    pytest.mark.skipif(not vector.is_fast(), reason="this CPU does not look up 16 codes at once"),
]

# tokens, heads, key heads, head_dim, tokens before them: blocks of queries and of 32 keys that are full and partial
SHAPES = [(64, 2, 2, 64, 0), (77, 4, 2, 32, 0), (1, 1, 1, 128, 0), (9, 6, 2, 32, 1), (19, 3, 1, 96, 45)]


def drawn(tokens, heads, kv_heads, head_dim, start):
    """Queries with other numbers behind them, angles, a cache that is full of NaN behind the last token, and start."""
    g = torch.Generator().manual_seed(tokens)
    kept = [torch.full((kv_heads, start + tokens + 3, head_dim), torch.nan) for _ in range(2)]
    for part in kept:
        part[:, : start + tokens] = torch.randn(kv_heads, start + tokens, head_dim, generator=g)
    angles = torch.rand(start + tokens + 3, head_dim // 2, generator=g).repeat(1, 2) * 6
    q = torch.randn(tokens, heads * head_dim + 5, generator=g) * 3
    return q, heads, (angles.cos(), angles.sin()), tuple(kept), start


def exactly(q, heads, rotary, kept, start):
    """The same in float64 by the readable functions."""
    stop = start + len(q)
    head_dim = kept[0].shape[2]
    parts = readable.by_heads(q[:, : heads * head_dim].double(), head_dim)
    turned = readable.rotate(parts, *(part[start:stop].double() for part in rotary))
    return readable.attend(turned, *(part[:, :stop].double() for part in kept))


@pytest.mark.parametrize("queries", [prompt_attention.QUERIES, prompt_attention.QUERIES_OF_16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_that_of_torch(shape, queries, monkeypatch):
    monkeypatch.setattr(prompt_attention, "_zeros", lambda: (np.float32(0),) * queries)
    given = drawn(*shape)
    exact = exactly(*given)
    # A score of up to 30 errs by some units of 2^-24 of itself, and its power by as much, relative to itself.
    assert (prompt_attention.attend(*given) - exact).abs().max() < 64 * 2.0**-24 * exact.abs().max()


pairs = pytest.mark.skipif(not words.has_pairs(), reason="needs AVX512-BF16")


@pairs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_in_pairs_is_as_near_as_that_of_torch(shape):
    q, heads, rotary, kept, start = drawn(*shape)
    exact = exactly(q, heads, rotary, kept, start)
    stop, head_dim = start + len(q), shape[3]
    turned = readable.rotate(readable.by_heads(q[:, : heads * head_dim], head_dim), *(t[start:stop] for t in rotary))
    theirs = readable.attend(turned.bfloat16(), *(part[:, :stop].bfloat16() for part in kept))
    found = prompt_pairs.attend(q, heads, rotary, kept, start)
    limit = max((theirs.double() - exact).norm() / exact.norm(), 2.0**-9)
    # Both round each factor of a product to 8 bits. 1.2: chance, in small cases.
    assert (found - exact).norm() / exact.norm() < 1.2 * limit


@pairs
def test_attention_in_pairs_does_not_depend_on_threads(one_thread):
    given = drawn(*SHAPES[1])
    alone = prompt_pairs.attend(*given)
    torch.set_num_threads(2)  # the fixture sets the number back
    assert torch.equal(alone, prompt_pairs.attend(*given))


@pytest.mark.parametrize("attention", [prompt_attention, pytest.param(prompt_pairs, marks=pairs)])
def test_no_query_feels_a_key_behind_it(attention):
    q, heads, rotary, kept, _ = drawn(50, 2, 1, 32, 0)
    before = attention.attend(q, heads, rotary, kept, 0)
    for part in kept:
        part[:, 40:50] = 1e30
    after = attention.attend(q, heads, rotary, kept, 0)
    assert torch.equal(before[:40], after[:40]) and not torch.equal(before[40:], after[40:])


def test_keys_are_turned_and_values_are_not():
    _, _, rotary, kept, _ = drawn(7, 1, 2, 32, 4)
    found = torch.randn(7, 40 + 4 * 32)  # other numbers, two heads of keys, two of values
    prompt_attention.put(found, rotary, kept, 4)
    k, v = (readable.by_heads(part, 32) for part in found[:, 40:].split(64, 1))
    wanted = readable.rotate(k, *(part[4:11] for part in rotary))
    torch.testing.assert_close(kept[0][:, 4:11], wanted, rtol=0, atol=2.0**-22)  # two products of numbers below 4
    assert torch.equal(kept[1][:, 4:11], v)


LAYOUTS = {  # rows, columns, tokens; options of quantize
    "nf4": ((32, 192, 13), ("nf4", 64, True)),
    "single constants, and a row more than two tiles": ((33, 256, 25), ("nf4", 128, False)),
    "fp4, whose codes are not sorted": ((17, 128, 12), ("fp4", 64, True)),
    "int4, which has 15 levels, in blocks wider than a panel": ((16, 8192, 2), ("int4", 4096, False)),
}


def product(x, q):
    room = prompt_rows.Room(len(x))
    out = torch.full((room.filled, len(q.codes.view(q.shape)) + 3), torch.nan)
    float_products.multiply(
        prompt_rows.as_they_are(x, room, frozenset({"tiles"})).tiles, q.plain, q.shape, out, column=2
    )
    assert out[:, :2].isnan().all() and out[:, -1].isnan().all()  # nothing beside the result is written
    return out[: len(x), 2:-1]


@pytest.mark.parametrize("shape, options", LAYOUTS.values(), ids=LAYOUTS)
def test_a_product_is_that_with_the_decoded_weight(shape, options):
    rows, columns, tokens = shape
    g = torch.Generator().manual_seed(rows)
    q = quantize(torch.randn(rows, columns, generator=g), *options)
    x = torch.randn(tokens, columns, generator=g)
    weight = dequantize(q, torch.float32).double()
    y = product(x, q)
    # One rounding for each column, each of a sum that is at most the sum of all sizes.
    assert ((y - x.double() @ weight.t()).abs() <= columns * 2.0**-24 * (x.double().abs() @ weight.t().abs())).all()
    assert torch.equal(product(x[:1], q), y[:1])  # a token does not depend on those beside it


def test_a_norm_a_gate_and_their_sums():
    """Rows are those of step.py, and tiles hold the same numbers, with zeros behind the last token."""
    x, more, weight = torch.randn(14, 96), torch.randn(16, 96), torch.randn(96)
    room, forms = prompt_rows.Room(14), frozenset({"plain", "tiles"})
    wanted = readable.rms_norm(x + more[:14], weight, 1e-5)
    total = x.clone()
    rows, finite = prompt_rows.normed(total, more, (weight, 1e-5), room, forms)
    assert finite and torch.equal(total, x + more[:14])
    torch.testing.assert_close(rows.plain, wanted, rtol=1e-5, atol=1e-6)
    size = prompt_rows.SIZE
    tiles = torch.from_numpy(rows.tiles).view(-1, 96, size).transpose(1, 2).reshape(-1, 96)
    assert torch.equal(tiles[:14], rows.plain) and (tiles[14:] == 0).all()
    both = torch.randn(16, 192) * 4
    gated = prompt_rows.gated(both, room, frozenset({"plain"})).plain
    wanted = torch.nn.functional.silu(both[:14, :96]) * both[:14, 96:]
    torch.testing.assert_close(gated, wanted, rtol=1e-5, atol=1e-6)


GATES = {  # rows, columns, tokens; options of quantize for the gate, and for up
    "five tokens": ((96, 64, 5), ("nf4", 64, True), ("nf4", 64, True)),
    "several tiles of tokens, single constants": ((64, 256, 25), ("nf4", 128, False), ("fp4", 128, False)),
    "blocks of 32, more columns than a panel holds": ((32, 4096, 13), ("int4", 32, False), ("nf4", 32, True)),
}


@pytest.mark.parametrize("shape, gate, up", GATES.values(), ids=GATES)
def test_gate_and_up_in_one_pass_are_the_same_numbers(shape, gate, up):
    rows, columns, tokens = shape
    g = torch.Generator().manual_seed(rows)
    weights = [quantize(torch.randn(rows, columns, generator=g) * 0.1, *options) for options in (gate, up)]
    levels = [int8.round_levels(weight.levels) for weight in weights]
    room, numbers = prompt_rows.Room(tokens), frozenset({"numbers"})
    x = prompt_rows.as_they_are(torch.randn(tokens, columns, generator=g), room, numbers).numbers
    both = room.out(2 * rows)
    for i, weight in enumerate(weights):
        int8_products.multiply(x, weight.plain, weight.shape, *levels[i], both, i * rows)
    wanted = prompt_rows.gated(both, room, numbers).numbers
    found = prompt_rows.Room(tokens).rows(rows, numbers).numbers
    assert prompt_gate.can_multiply(*weights)
    prompt_gate.multiply(x, [weight.plain for weight in weights], levels, shape[:2], found)
    for name, part, other in zip(wanted._fields, wanted, found, strict=True):
        assert np.array_equal(part, other), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sum_that_is_not_finite_is_noticed(value):
    x, more = torch.zeros(14, 96), torch.zeros(14, 96)
    more[13, 95] = value
    assert not prompt_rows.normed(x, more, (torch.ones(96), 1e-5), prompt_rows.Room(14), frozenset({"plain"}))[1]
