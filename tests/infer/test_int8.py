"""Products in int8: the whole numbers by hand, the kernel beside its twin, and prompts that are read with them."""

import copy

import pytest
import torch

from qlora_lab import kernels
from qlora_lab.infer import fast, int8, step as readable
from qlora_lab.infer.cache import make_cache
from qlora_lab.infer.chat import Chat
from qlora_lab.infer.decode import Decoding, decode
from qlora_lab.infer.sampling import Sampling
from qlora_lab.infer.stack import Product, read_stack
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.quantize import dequantize, quantize
from tests.infer.conftest import dequantised, small
from tests.infer.test_step import IDS, adapted

INT8 = Sampling(int8_prompt=True)


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
    with pytest.raises(ValueError, match="not read in int8 .its gate is GELUActivation.*leave the option out"):
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
def test_only_the_prompt_is_read_in_int8(packed, tokenizer, monkeypatch):
    """The first token is read in float32, and the last one is a step: of two tokens none is rounded."""
    monkeypatch.setattr(fast, "can_step", lambda stack: False)  # nothing is compiled
    calls = []
    forward = int8.forward
    monkeypatch.setattr(int8, "forward", lambda x, weight: calls.append(len(x)) or forward(x, weight))
    two, five = [[7, 8]], [[7, 8, 9, 10, 11]]
    assert decode(packed, tokenizer, two, 5, sampling=INT8) == decode(packed, tokenizer, two, 5) and not calls
    (answer,) = decode(packed, tokenizer, five, 5, sampling=INT8)
    assert (
        len(answer.ids) == 5 and calls == [3] * 7 * 2
    )  # all tokens but the first and the last, in 7 products of 2 layers


@pytest.mark.long
def test_what_was_said_is_read_in_float32(packed, tokenizer, monkeypatch):
    """Else an answer that was left would go on differently."""
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    calls = []
    forward = int8.forward
    monkeypatch.setattr(int8, "forward", lambda x, weight: calls.append(len(x)) or forward(x, weight))
    run = Decoding(packed, tokenizer, [[7, 8, 9]], 9, INT8)
    for _ in run:
        break
    list(run)
    assert run.answers == decode(packed, tokenizer, [[7, 8, 9]], 9, INT8) and set(calls) == {1}


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
