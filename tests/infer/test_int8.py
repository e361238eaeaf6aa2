"""Products in int8: the whole numbers by hand, the kernel beside its twin, and prompts that are read with them."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from numba import njit
from transformers import Qwen2Config

from qlora_lab import kernels
from qlora_lab.infer import fast, int8, step as readable
from qlora_lab.infer.cache import make_cache
from qlora_lab.infer.chat import Chat
from qlora_lab.infer.decode import Decoding, decode
from qlora_lab.infer.sampling import Sampling
from qlora_lab.infer.stack import Product, read_stack
from qlora_lab.kernels import decode_int8, few_tokens, int8_products
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.quantize import dequantize, quantize
from tests.infer.conftest import dequantised, small
from tests.infer.test_step import BOUND, IDS, adapted, assert_near, kernel

INT8 = Sampling(int8=True)


def test_blocks_by_hand():
    """127 / 2 = 63.5 for 1: so 0.5 is 31.75 and becomes 32, and 1.0 is a tie, which goes to the even 64."""
    x = torch.tensor([[0.5, 1.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0], [8.0, torch.inf, 1.0, 1.0, -1.0, torch.nan, 0.0, 0.0]])
    numbers, scales = int8.round_blocks(x, 4)
    assert numbers[0].tolist() == [[32, 64, -127, 0], [0, 0, 0, 0]]
    assert scales[0].tolist() == [torch.tensor(2 / 127).item(), 0] and scales[1].isnan().all()


@pytest.mark.parametrize("name, top, worst", [("nf4", 112, 0.0039), ("fp4", 120, 0.0032), ("int4", None, 1e-6)])
def test_the_largest_level_suits_all_of_them(name, top, worst):
    """Half a unit of 127 is 0.0039. Every multiple of 8 is exact for int4, -8 to 7 over 7."""
    levels, unit = int8.round_levels(codebook(name))
    largest = int(levels.abs().max())
    assert (largest % 8 == 0 if top is None else largest == top) and unit == pytest.approx(
        codebook(name).abs().max().item() / largest, rel=1e-6
    )
    assert (levels * unit - codebook(name)).abs().max() < worst


def test_levels_need_not_end_at_1():
    levels, unit = int8.round_levels(torch.tensor([-0.5, 0.1, 2.0]))
    assert (levels.tolist(), unit) == ([-20, 4, 80], 2 / 80)


@pytest.mark.long  # compiles the kernel
def test_a_product_by_hand(with_kernels):
    """Of ones with weights of one block each, absmax 1, 2, 3 ...: 64 products of 127 with 127, scaled back."""
    weight = torch.arange(1.0, 18.0)[:, None].expand(17, 64).contiguous()
    (y,) = int8.forward(torch.full((1, 64), -3.0), quantize(weight, "nf4"))
    torch.testing.assert_close(y, -3 * 64 * torch.arange(1.0, 18.0), rtol=3 * 2.0**-24, atol=0)


LAYOUTS = {  # rows, columns, tokens; options of quantize
    "nf4": ((32, 192, 13), ("nf4", 64, True)),
    "single constants, and a row more than two tiles": ((33, 256, 25), ("nf4", 128, False)),
    "fp4, whose codes are not sorted, and one token": ((17, 128, 1), ("fp4", 64, True)),
    "int4, which has 15 levels, in the largest blocks": ((16, 4096, 12), ("int4", 4096, False)),
    "blocks of 32, and columns that 64 does not divide": ((20, 96, 14), ("nf4", 32, True)),
    "fewer rows than lanes": ((15, 128, 3), ("nf4", 64, True)),
}


def exactly(x: torch.Tensor, q) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64 from the same whole numbers, and the sum of the sizes of its blocks."""
    numbers, scales = int8.round_blocks(x, 32)
    levels, unit = int8.round_levels(q.levels)
    blocks = q.shape[1] // 32
    whole = levels[q.codes.long()].view(q.shape[0], blocks, -1).double()
    terms = torch.einsum("tbk,rbk->trb", numbers.double(), whole) * scales.double()[:, None]
    terms *= q.absmax.double().repeat_interleave(q.block_size // 32).view(-1, blocks) * unit
    return terms.sum(-1), terms.abs().sum(-1)


@pytest.mark.long
@pytest.mark.parametrize("override", ["", "reference"], ids=["kernel", "readable"])
@pytest.mark.parametrize("shape, options", LAYOUTS.values(), ids=LAYOUTS)
def test_both_add_up_the_same_whole_numbers(shape, options, override, monkeypatch):
    """What is left is float32: three roundings for each block, and one for each of the additions."""
    monkeypatch.setenv(kernels.OVERRIDE, override)
    rows, columns, tokens = shape
    g = torch.Generator().manual_seed(rows)
    q = quantize(torch.randn(rows, columns, generator=g), *options)
    x = torch.randn(tokens, columns, generator=g) * torch.logspace(-20, 20, tokens)[:, None]
    x[-1, :64] = 0
    y = int8.forward(x, q)
    exact, size = exactly(x, q)
    assert y.shape == (tokens, rows) and y.dtype == torch.float32
    assert ((y - exact).abs() <= (columns // 32 + 5) * 2.0**-24 * size).all()
    exact = x.double() @ dequantize(q, torch.float32).t().double()
    share = ((y - exact).norm(dim=1) / exact.norm(dim=1)).median()
    assert 0.002 < share < 0.03, share  # it is int8: 1/254 of a block's largest for each factor


@pytest.mark.long
def test_a_token_does_not_depend_on_those_beside_it(with_kernels):
    x, q = torch.randn(40, 128), quantize(torch.randn(48, 128), "nf4")
    together = int8.forward(x, q)
    assert torch.equal(torch.cat([int8.forward(x[:7], q), int8.forward(x[7:], q)]), together)
    x[3, 70], x[20, 5] = torch.nan, -torch.inf
    broken = int8.forward(x, q)
    assert broken[[3, 20]].isnan().all()
    kept = [i for i in range(40) if i not in (3, 20)]
    assert torch.equal(broken[kept], together[kept])


@pytest.mark.long
def test_rows_that_are_nothing_or_nearly(with_kernels):
    q = quantize(torch.randn(16, 64), "nf4")
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e-44), torch.full((64,), 1e35)])
    y = int8.forward(x, q)
    assert (y[0] == 0).all() and (y[1].abs() < 1e-41).all() and y[2].isfinite().all()


def test_what_stands_beside_the_product_is_float32(with_kernels, monkeypatch):
    monkeypatch.setenv(kernels.OVERRIDE, "reference")
    q, x = quantize(torch.randn(6, 64), "nf4"), torch.randn(3, 64)
    A, B, bias = torch.randn(2, 64), torch.randn(6, 2), torch.randn(6)
    beside = readable.multiply(x, Product(q, bias, (A, B, 0.5), int8=True)) - int8.forward(x, q)
    torch.testing.assert_close(beside, 0.5 * x @ A.t() @ B.t() + bias, rtol=1e-5, atol=1e-4)


def last_hidden(stack) -> torch.Tensor:
    with torch.no_grad():
        return readable.forward(stack, IDS, make_cache(stack, 1, len(IDS)))  # (tokens, hidden)


@pytest.mark.long
def test_a_prompt_in_int8_is_near_the_one_in_float32(packed):
    stack = read_stack(adapted(packed, 4))
    exact, rounded = last_hidden(stack), last_hidden(int8.with_int8(stack))
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-3 < error < 0.15, error  # 0.06: two layers, each product with 1 %


def test_layers_that_do_not_fit_stay_as_they_are(with_kernels):
    """The head is not packed, and down_proj has rows of 192, which blocks of 128 do not divide."""
    stack = int8.with_int8(read_stack(quantize_linears(small(), block_size=128)))
    parts = zip(stack.layers[0]._fields, stack.layers[0], strict=True)
    assert {name for name, part in parts if isinstance(part, Product) and part.int8} == {*"qkvo", "gate", "up"}
    assert not stack.head.int8


@pytest.mark.parametrize(
    "make",
    [lambda: small(), lambda: quantize_linears(small(), block_size=16), lambda: quantize_linears(small(), "nf3")],
    ids=["not quantised", "blocks of 16", "3 bits"],
)
def test_weights_that_do_not_fit_are_refused(make, tokenizer, with_kernels):
    for door in (Chat, lambda *given, **more: decode(*given, "a", progress=False, **more)):
        with pytest.raises(ValueError, match="no layer has them: quantise with block_size=64, or leave the option out"):
            door(make(), tokenizer, sampling=INT8)


def test_a_model_that_transformers_answers_for_is_refused(tokenizer):
    model = small(hidden_act="gelu")
    with pytest.raises(ValueError, match="does not compute in int8 .its gate is GELUActivation.*leave the option out"):
        Decoding(model, tokenizer, "a", sampling=INT8)


def test_a_cache_of_8_bits_is_refused_there_too(tokenizer):
    model = small(hidden_act="gelu")
    for door in (Chat, lambda *given, **more: decode(*given, "a", progress=False, **more)):
        with pytest.raises(ValueError, match="has no cache of 8 bits .its gate is GELU.*leave the option out"):
            door(model, tokenizer, sampling=Sampling(cache_bits=8))


@pytest.mark.parametrize("bits", [16, 8.5, "8", True, None])
def test_bits_that_no_cache_has(bits):
    with pytest.raises(ValueError, match="cache_bits=.* is not allowed: it is 32 or 8"):
        Sampling(cache_bits=bits)


@pytest.mark.long
@pytest.mark.parametrize("prompts, read", [([7, 8, 9, 10, 11], [3]), ([7, 8], []), ([7], None)], ids=str)
def test_all_but_the_first_token_are_computed_in_int8(prompts, read, packed, tokenizer, monkeypatch):
    """Of five tokens, three are read together, and the last is a step, as are four of the answer's five."""
    monkeypatch.setattr(fast, "can_step", lambda stack: False)  # nothing is compiled
    calls = []
    forward = int8.forward
    monkeypatch.setattr(int8, "forward", lambda x, weight: calls.append(len(x)) or forward(x, weight))
    (answer,) = decode(packed, tokenizer, [prompts], 5, sampling=INT8)
    steps = [1] * (4 if read is None else 5)  # if the prompt has one token, the first step is in float32
    assert len(answer.ids) == 5 and calls == [n for n in [*(read or []), *steps] for _ in range(7 * 2)]


@pytest.mark.long
def test_rows_that_begin_beside_rows_that_go_on(packed, monkeypatch):
    """A row's logits are those that it has alone: its first token in float32, all others in int8."""
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    stack = read_stack(packed)
    step, together, alone = fast.step_of(stack, True), make_cache(stack, 3, 4), make_cache(stack, 3, 4)
    with torch.no_grad():
        for rows in ([1], [0, 1, 2], [2, 0]):
            rows = torch.tensor(rows)
            logits = step(IDS[rows], together, rows)
            expected = [step(IDS[row : row + 1], alone, row[None]) for row in rows]
            assert_near(logits, torch.cat(expected))  # the head multiplies all rows at once, in another order
    exact = readable.step(stack, IDS[:1], make_cache(stack, 1, 4), torch.tensor([0]))
    assert torch.equal(step(IDS[:1], make_cache(stack, 1, 4), torch.tensor([0])), exact)


@pytest.mark.long
def test_an_answer_that_was_left_goes_on(packed, tokenizer, monkeypatch):
    """What was said is read in int8, as it was when it was said."""
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    run = Decoding(packed, tokenizer, [[7, 8, 9]], 9, INT8)
    for number, _ in enumerate(run):
        if number == 3:
            break
    run.prefix = None  # all of it is read again
    list(run)
    assert run.answers == decode(packed, tokenizer, [[7, 8, 9]], 9, INT8)


@njit
def added(x, codes, table, scales, unit, block_size, rows, zeros, lanes):
    """Rows of a weight through decode_int8, 16 at a time, as decode_products does."""
    columns = x.shape[1]
    numbers = decode_int8.aligned((columns + 127) // 128 * len(x) * decode_int8.PER_CHUNK)
    decode_int8.round_rows(x, numbers)
    for first in range(0, rows, 16):
        own = scales[first * columns // block_size :]
        place = first, min(first + 16, rows), columns
        decode_int8.add_rows(codes, table, own, unit, block_size, *place, numbers, zeros, lanes[first // 16])


def by_kernel(x: torch.Tensor, q) -> torch.Tensor:
    """The product (tokens, rows) of 1, 4 or 8 tokens."""
    rows, tokens = q.shape[0], len(x)
    levels, unit = int8.round_levels(q.levels)
    table = int8_products.level_bytes(levels)
    lanes = np.zeros((-(-rows // 16), tokens, 256), np.float32)
    scales = np.concatenate([q.absmax.numpy(), np.full(16, np.nan, np.float32)])  # what is behind a row counts nothing
    zeros = (np.float32(0),) * tokens
    added(x.numpy(), q.packed.numpy().view(np.int32), table, scales, np.float32(unit), q.block_size, rows, zeros, lanes)
    totals = torch.from_numpy(lanes).view(-1, tokens, 16, 16).sum(-1)  # (tiles, tokens, 16)
    return totals.transpose(0, 1).reshape(tokens, -1)[:, :rows]


TOKEN_LAYOUTS = {  # rows, columns; options of quantize
    "nf4, and a chunk that begins in the one before": ((32, 192), ("nf4", 64, True)),
    "single constants, and a row more than two tiles": ((33, 256), ("nf4", 128, False)),
    "fp4, whose codes are not sorted, in one chunk": ((3, 128), ("fp4", 64, True)),
    "int4, which has 15 levels, in the largest blocks": ((2, 4096), ("int4", 4096, False)),
    "blocks of 32, of which a chunk repeats three": ((18, 160), ("nf4", 32, True)),
}


@kernel
@pytest.mark.long
@pytest.mark.parametrize("shape, options", TOKEN_LAYOUTS.values(), ids=TOKEN_LAYOUTS)
def test_a_token_adds_up_the_same_whole_numbers(shape, options):
    """Float32 rounds a lane's part of each chunk four times, then the sums of chunks, and those of lanes."""
    rows, columns = shape
    g = torch.Generator().manual_seed(rows)
    q = quantize(torch.randn(rows, columns, generator=g), *options)
    xs = torch.randn(4, columns, generator=g) * torch.tensor([1.0, 1e-20, 1e20, 3.0])[:, None]
    xs[3, :64] = 0
    numbers, scales = int8.round_blocks(xs, 32)
    levels, unit = int8.round_levels(q.levels)
    whole = levels[q.codes.long()].view(rows, columns).double()
    weight = whole * q.absmax.double().repeat_interleave(q.block_size).view(rows, columns) * unit
    rounded = (numbers.double() * scales.double()[..., None]).view(4, columns)
    bound = (columns // 128 + 24) * 2.0**-24 * (rounded.abs() @ weight.abs().t())
    alone = torch.cat([by_kernel(x[None], q) for x in xs])
    assert ((alone - rounded @ weight.t()).abs() <= bound).all()
    assert torch.equal(by_kernel(xs, q), alone)  # however many there are
    xs[1, 40], xs[2, 3] = torch.nan, torch.inf
    broken = by_kernel(xs, q)
    assert broken[1:3].isnan().all() and torch.equal(broken[::3], alone[::3])


@kernel
@pytest.mark.long
@pytest.mark.parametrize("options", [("nf4", 64, True), ("int4", 32, False)], ids=str)
def test_the_kernel_s_step_in_int8_is_the_readable_one(options, with_kernels):
    """Where the last bit of x decides between two whole numbers, all that follows is as far off as int8 is: 0.02 seen.

    So each token continues a prompt that both read in the same way, and most must agree to float32's bound.
    """
    model = adapted(quantize_linears(small(config=Qwen2Config), *options), 4)  # with biases
    exact = read_stack(model)
    stack = int8.with_int8(exact)
    assert fast.can_step(stack)
    row, errors = torch.tensor([0]), []
    with torch.no_grad():
        for place in range(1, 13):
            both = []
            for step in (fast.FastStep(stack), partial(readable.step, stack)):
                cache = make_cache(stack, 1, place + 1)
                readable.read_prompt(exact, IDS[:place], cache)
                both.append(step(IDS[place : place + 1], cache, row))
            errors.append(((both[0] - both[1]).abs().max() / both[1].abs().max()).item())
    assert sorted(errors)[6] < BOUND and max(errors) < 0.15, errors


def test_sizes_without_a_kernel_for_a_token(with_kernels):
    """A row of 96 columns has no chunk, and blocks of 96 do not lie alike in each chunk: the readable step computes."""
    for changes, block_size in (({"hidden_size": 96, "num_attention_heads": 1, "head_dim": 96}, 32), ({}, 96)):
        sizes = {"hidden_size": 192, "intermediate_size": 192, "num_attention_heads": 3} | changes
        stack = read_stack(quantize_linears(small(**sizes), block_size=block_size))
        rounded = int8.with_int8(stack)
        assert rounded.layers[0].q.int8 and not fast.can_step(rounded)
        assert fast.can_step(stack) == few_tokens.cpu.FAST


@pytest.mark.long
def test_the_adapter_counts_and_can_be_left_out(packed, tokenizer, monkeypatch):
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    (base,) = decode(copy.deepcopy(packed), tokenizer, "the sum of", 8, sampling=INT8)
    run = Decoding(adapted(packed, 4), tokenizer, "the sum of", 8, adapter=False, sampling=INT8)
    list(run)
    assert run.answers == [base]
    chat = Chat(packed, tokenizer, 6, sampling=INT8)
    assert "".join(chat.ask("a")) == chat.reply.text and chat.reply.tokens == 6


@pytest.mark.long
def test_a_nan_names_its_layer(packed, tokenizer):
    packed.model.layers[1].post_attention_layernorm.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="layer 1 of 2 computes a number that is not finite"):
        decode(packed, tokenizer, "the sum of", 3, progress=False, sampling=INT8)
    assert dequantised(packed)(IDS[None]).logits.isnan().any()
