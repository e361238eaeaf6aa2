"""A step: the readable one equals transformers, the kernel's equals the readable one, whatever the model is made of."""

import copy
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from numba import njit
from torch import nn
from transformers import GemmaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.infer import fast, step as readable
from qlora_lab.infer.cache import Cache, make_cache
from qlora_lab.infer.fast import FastStep, bytes_read, step_of
from qlora_lab.infer.int8 import with_int8
from qlora_lab.infer.stack import UnlikeLlama, read_stack
from qlora_lab.kernels import compiled, decode_step, few_tokens, product
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.model.wide import WideHead, widen
from qlora_lab.quant.codebook import codebook, rounding
from qlora_lab.quant.quantize import dequantize, quantize
from tests.infer.conftest import dequantised, small

# Error of a logit over the largest: float32 has 24 bits, sums of up to 128 terms come in any order, and each of the two
# layers passes on what the one before it rounded. The largest that was seen is 4.3e-6, on an Intel Xeon.
BOUND = 2.0**-17
IDS = torch.arange(3, 43) * 7 % 280
ROW = torch.tensor([0])
kernel = pytest.mark.skipif(not few_tokens.cpu.FAST, reason="this CPU does not look up 16 codes at once")


def logits_of(model, step=None, ids=IDS, prompt=20, bits=32) -> torch.Tensor:
    """Logits (tokens, vocabulary) of the tokens behind the prompt, one step each, in a cache that was full of NaN."""
    stack = read_stack(model)
    cache = make_cache(stack, 1, len(ids), bits)
    for part in cache.kept:
        part.fill_(torch.nan if part.is_floating_point() else 255)
    step = step(stack) if step else lambda *given: readable.step(stack, *given)
    with torch.no_grad():
        readable.read_prompt(stack, ids[:prompt], cache)
        return torch.cat([step(ids[i : i + 1], cache, torch.tensor([0])) for i in range(prompt, len(ids))])


def assert_near(logits, expected, bound=BOUND):
    worst = (logits - expected).abs().max() / expected.abs().max()
    assert worst < bound, f"{worst:.1e} of the largest logit, allowed {bound:.1e}"


def theirs(model, ids=IDS, prompt=20) -> torch.Tensor:
    """transformers' logits in double precision: in float32 its sums err as much as ours, and differ by processor."""
    with torch.no_grad():
        return copy.deepcopy(model).double()(ids[None]).logits[0, prompt:]


def adapted(model, r: int):
    add_lora(model, r=r, alpha=2 * r)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(r))
    return model


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_theta": 10000.0}
FAMILIES = {
    "llama": {},
    "mistral": {"config": MistralConfig, "sliding_window": None, "head_dim": 64},
    "qwen2, which has biases": {"config": Qwen2Config},
    "four heads for each key head": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "a tied head": {"tie_word_embeddings": True},
    "llama3's rotary scaling": {"rope_parameters": LLAMA3},
    "YaRN": {"rope_parameters": YARN},
}


@pytest.mark.long
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_the_readable_step_is_transformers(changes, with_kernels):
    model = quantize_linears(small(**changes))
    assert_near(logits_of(model), theirs(dequantised(model)))


@pytest.mark.long
@kernel
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_the_kernel_s_step_is_transformers(changes, with_kernels):
    model = quantize_linears(small(**changes))
    assert_near(logits_of(model, FastStep), theirs(dequantised(model)))


@pytest.mark.long
def test_a_prompt_that_is_read_in_parts(packed, monkeypatch):
    monkeypatch.setattr(readable, "FEWEST", 7)
    monkeypatch.setattr(readable, "NUMBERS_AT_ONCE", 0)
    assert_near(logits_of(packed), theirs(dequantised(packed)))


PACKINGS = {
    "nf4 without double quantization": ("nf4", 64, False),
    "int4 in blocks of 32": ("int4", 32, True),
    "fp4": ("fp4", 64, True),
}


@pytest.mark.long
@kernel
@pytest.mark.parametrize("options", PACKINGS.values(), ids=PACKINGS)
def test_every_packing(options, with_kernels):
    model = quantize_linears(small(), *options)
    assert_near(logits_of(model, FastStep), theirs(dequantised(model)))


@pytest.mark.long
@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_packed(dtype, with_kernels):
    model = small().to(dtype)
    expected = theirs(copy.deepcopy(model).float())
    model.model.rotary_emb = small().model.rotary_emb  # a cast rounds its frequencies, as loading does not
    expected = theirs(dequantised(model)) if dtype == torch.float32 else expected_of(model)
    assert_near(logits_of(model), expected)
    assert_near(logits_of(model, FastStep), expected)


def expected_of(model) -> torch.Tensor:
    wide = copy.deepcopy(model).float()
    wide.model.rotary_emb = small().model.rotary_emb
    return theirs(wide)


@pytest.mark.long
@kernel
@pytest.mark.parametrize("r", [1, 8, 16, 20])
def test_adapters_of_any_rank(r, packed):
    model = adapted(packed, r)
    expected = theirs(dequantised(model))
    assert_near(logits_of(model), expected)
    assert_near(logits_of(model, FastStep), expected)
    assert (expected - theirs(dequantised(quantize_linears(small())))).abs().max() > 0.1  # they do something


@pytest.mark.long
@kernel
def test_relatives_of_lora_that_are_a_product(packed):
    model = add_adapter(packed, "pissa", r=4, progress=False)
    for layer in adapters(model).values():
        layer.lora_B.data *= 1.5
    assert_near(logits_of(model, FastStep), theirs(dequantised(model)))


@pytest.mark.long
@kernel
def test_threads_change_nothing(monkeypatch):
    """Each sum is one thread's, whichever that is."""
    threads_of = []
    step_before = decode_step.step
    monkeypatch.setattr(decode_step, "step", lambda *given: (threads_of.append(given[-1]), step_before(*given))[1])
    one, three = [], []
    for threads, into in ((1, one), (3, three)):
        monkeypatch.setattr(compiled, "thread_count", lambda threads=threads: threads)
        into.append(logits_of(adapted(quantize_linears(small()), 4), FastStep))
    assert set(threads_of) == {1, 3}
    assert torch.equal(*one, *three)


@kernel
@pytest.mark.slow
@pytest.mark.parametrize("rounded", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("count", [2, 3, 11])
def test_rows_of_other_lengths_do_not_disturb_each_other(count, rounded, packed):
    """Equal to each row alone, to the last bit."""
    stack = read_stack(adapted(packed, 4))
    stack = with_int8(stack) if rounded else stack
    step = FastStep(stack)
    rows = [IDS[: 3 + 2 * i] for i in range(count)]
    together = make_cache(stack, count, len(IDS))
    alone = [make_cache(stack, 1, len(IDS)) for _ in rows]
    with torch.no_grad():
        for i, ids in enumerate(rows):
            readable.read_prompt(stack, ids, together, i)
            readable.read_prompt(stack, ids, alone[i])
        order = torch.arange(count).flip(0)  # any order of rows
        for token in (5, 9):
            ids = torch.full((count,), token)
            logits = step(ids, together, order)
            for place, row in enumerate(order.tolist()):
                assert torch.equal(logits[place : place + 1], step(ids[:1], alone[row], torch.tensor([0])))
    assert together.lengths.tolist() == [len(ids) + 2 for ids in rows]


HEADS = {name: FAMILIES[name] for name in ("llama", "mistral", "four heads for each key head")}


@pytest.mark.long
@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
def test_a_cache_of_8_bits(changes, with_kernels, monkeypatch):
    """The same as rounding each key and value of a head to INT8 in a cache of 32 bits."""
    monkeypatch.setattr(fast, "can_step", lambda stack: False)  # the kernel for prompts does without Cache.put
    model = quantize_linears(small(**changes))
    narrow = logits_of(model, bits=8)
    put = Cache.put

    def rounding(self, layer, row, keys, values):
        rounded = (dequantize(quantize(part, "int8", part.shape[-1])) for part in (keys, values))
        return put(self, layer, row, *rounded)

    wide = logits_of(model)
    monkeypatch.setattr(Cache, "put", rounding)
    assert torch.equal(narrow, logits_of(model))
    assert (narrow - wide).abs().max() > 2**-12 * wide.abs().max()  # 32 bits are something else


@pytest.mark.long
@kernel
@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS)
def test_the_kernel_s_cache_of_8_bits(changes, with_kernels):
    """Where the last bit of a key decides between two codes, kernel and twin may differ by a step of that number.

    So the bound is a step of one number in 64, 1/127 of the largest, on its way through two layers.
    """
    model = quantize_linears(small(**changes))
    assert_near(logits_of(model, FastStep, bits=8), logits_of(model, bits=8), 2.0**-10)


@kernel
@pytest.mark.long
def test_the_kernel_s_codes_are_those_of_int8():
    g = torch.Generator().manual_seed(0)
    levels = codebook("int8")
    ties = (levels[1:] + levels[:-1]) / 2  # between two levels, as far as float32 holds that
    cases = [torch.randn(64, generator=g) * 10.0**power for power in (-44, -38, -20, 0, 20, 37)]
    cases += [torch.cat([some, torch.ones(64 - len(some))]) for some in ties.split(60)]
    cases += [torch.cat([some * 3.7, torch.full((64 - len(some),), 3.7)]) for some in ties.split(60)]
    cases += [torch.zeros(64), -torch.zeros(64), torch.randn(64, generator=g).clamp(-0.1, 1)]
    thresholds = rounding(levels)[0].numpy()
    for case in cases:
        codes, absmax = np.zeros(64, np.uint8), np.zeros(1, np.float32)
        kept(case.numpy(), codes, absmax, thresholds)
        block = quantize(case, "int8", 64)
        assert codes.tolist() == block.packed.tolist() and absmax.tolist() == block.absmax.tolist()
    for wrong in (np.nan, np.inf, -np.inf):
        for place in (0, 31, 63):
            case = torch.ones(64)
            case[place] = wrong
            kept(case.numpy(), codes, absmax, thresholds)
            assert np.isnan(absmax[0])


@njit
def kept(vector, codes, absmax, thresholds):
    decode_step._keep(vector, codes, absmax, thresholds)


@pytest.mark.long
@pytest.mark.parametrize("step", [None, pytest.param(FastStep, marks=kernel)])
def test_a_nan_passes_a_cache_of_8_bits(step, packed):
    packed.model.layers[0].input_layernorm.weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="layer 0 of 2") if step is None else nullcontext():
        stack = read_stack(packed)
        logits = (step(stack) if step else partial(readable.step, stack))(IDS[:1], make_cache(stack, 1, 4, 8), ROW)
        assert logits.isnan().all()


@kernel
@pytest.mark.slow  # compiles the step for four rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_head_with_an_odd_number_of_rows(dtype):
    """A batch reads weights that are not packed two rows at a time, and the last of 281 twice."""
    stack = read_stack(small(vocab_size=281).to(dtype))
    step, every = FastStep(stack), torch.arange(3)
    together, alone = make_cache(stack, 3, 4), [make_cache(stack, 1, 4) for _ in every]
    with torch.no_grad():
        logits = step(IDS[:3], together, every)
        expected = torch.cat([step(IDS[i : i + 1], alone[i], torch.tensor([0])) for i in range(3)])
    assert logits.shape == (3, 281)
    assert torch.equal(logits, expected)


@pytest.mark.long
def test_sizes_that_the_kernel_does_not_take_are_computed(with_kernels):
    model = quantize_linears(small(hidden_size=48, num_attention_heads=2), block_size=16)
    step = step_of(read_stack(model))
    assert not isinstance(step, FastStep)
    assert_near(logits_of(model, step_of), theirs(dequantised(model)))


def test_kernels_can_be_switched_off(packed, monkeypatch):
    from qlora_lab import kernels

    assert isinstance(step_of(read_stack(packed)), FastStep) == few_tokens.cpu.FAST
    monkeypatch.setenv(kernels.OVERRIDE, "reference")
    assert not isinstance(step_of(read_stack(packed)), FastStep)


def test_the_cache_has_the_bytes_of_its_formula(packed):
    cache = make_cache(read_stack(packed), rows=3, capacity=10)
    assert cache.nbytes == 4 * (2 * 2 * 3 * 1 * 10 * 64 + 2 * 10 * 64)
    narrow = make_cache(read_stack(packed), rows=3, capacity=10, bits=8)
    assert narrow.nbytes == (64 + 4) * 2 * 2 * 3 * 1 * 10 + 4 * 2 * 10 * 64


@pytest.mark.long  # compiles the product of a prompt
def test_a_head_that_load_has_widened_is_read(monkeypatch):
    """Where float32 products win, `load` gives a model of 16 bits such a head; it is computed here, too."""
    model = small().bfloat16()
    monkeypatch.setattr(product, "race", lambda: product.Race.won_by("float32"))
    assert widen(model) and type(model.get_output_embeddings()) is WideHead
    assert torch.equal(read_stack(model).head.weight, model.get_output_embeddings().weight)


def test_a_full_cache_is_refused(packed):
    stack = read_stack(packed)
    cache = make_cache(stack, 1, 4)
    with torch.no_grad():
        readable.read_prompt(stack, IDS[:4], cache)
        with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
            readable.read_prompt(stack, IDS[:1], cache)
        with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
            FastStep(stack)(IDS[:1], cache, torch.tensor([0]))


def test_bytes_of_a_token(packed):
    """Packed at 4.5 bits with single constants, and the head in float32; by hand."""
    model = quantize_linears(small(), double_quant=False)
    layer = 128 * 128 * 2 + 2 * 64 * 128 + 3 * 192 * 128  # q and o, k and v, gate and up and down
    assert bytes_read(read_stack(model)) == 2 * layer * 4.5 / 8 + 280 * 128 * 4
    before = bytes_read(read_stack(model))
    ends = 2 * (128 + 128) + 2 * (128 + 64) + 3 * (128 + 192)  # columns of A and rows of B, of the seven products
    assert bytes_read(read_stack(adapted(model, 2))) - before == 2 * ends * 2 * 4


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda *_: None)
    return model


REFUSED = {
    "another family": (lambda: small(config=GemmaConfig, head_dim=64), "not of llama, mistral, qwen2"),
    "one with more norms": (lambda: small(config=Qwen3Config, head_dim=64), "not of llama, mistral, qwen2"),
    "a window": (lambda: small(config=MistralConfig, sliding_window=8), "sees a window"),
    "another gate": (lambda: small(hidden_act="gelu"), "its gate is GELUActivation, not SiLU"),
    "rotary angles that change": (
        lambda: small(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        "its rotary embedding, dynamic, changes",
    ),
    "DoRA": (lambda: add_adapter(small(), "dora", r=2), "q_proj is a DoRALinear"),
    "adapters beside a layer": (lambda: add_adapter(small(), "houlsby"), "layers"),
    "a prefix": (lambda: add_adapter(small(), "prefix"), "model has a hook"),
    "a hook": (lambda: hooked(small()), "layers.1 has a hook"),
}


def changed(path: str, **attributes):
    """`small` with other attributes of one module, as a caller may set them: transformers computes with them."""
    model = small()
    module = model.get_submodule(path)
    for name, value in attributes.items():
        setattr(module, name, value)
    return model


class LouderForCausalLM(LlamaForCausalLM):
    """Another model under a name that ends as theirs do."""


class Scaled(nn.Embedding):
    """Gemma's embedding does this."""


class Foreign(nn.Linear):
    """Other libraries pack weights in subclasses."""


ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
REFUSED |= {
    "a gate that was replaced": (lambda: changed(MLP, act_fn=nn.GELU()), "its gate is GELU, not SiLU"),
    "a forward that was replaced": (lambda: changed(MLP, forward=abs), "model.layers.1.mlp has a forward of its own"),
    "a subclass": (
        lambda: changed("", __class__=LouderForCausalLM),
        "its LouderForCausalLM is not one of",
    ),
    "another norm": (lambda: changed("model", norm=nn.LayerNorm(128)), "its LayerNorm is not one of"),
    "another embedding": (lambda: changed("model.embed_tokens", __class__=Scaled), "its embedding is a Scaled"),
    "another linear layer": (lambda: changed(f"{MLP}.up_proj", __class__=Foreign), r"layers.1.up_proj is a Foreign"),
    "float64": (lambda: small().double(), "layers.0.q_proj is a Linear of torch.float64"),
    "another scale": (lambda: changed(ATTENTION, scaling=0.5), "its attention has a scale of its own"),
    "another eps": (lambda: changed("model.norm", variance_epsilon=0.5), "its norms differ in eps"),
    "a pruned layer": (
        lambda: changed(MLP, gate_proj=nn.Linear(128, 96, False), up_proj=nn.Linear(128, 96, False)),
        "its layers differ in size",
    ),
}


@pytest.mark.long
@kernel
def test_a_configuration_that_is_changed_later_changes_nothing(with_kernels):
    """The modules were made with the numbers that it had."""
    model = quantize_linears(small())
    expected = theirs(dequantised(model))
    model.config.rms_norm_eps, model.config.num_key_value_heads, model.config.hidden_act = 0.5, 2, "gelu"
    assert_near(logits_of(model, FastStep), expected)


@pytest.mark.long
@kernel
def test_an_adapter_beside_the_head(packed):
    model = add_lora(packed, r=3, alpha=6, targets=["lm_head", "q_proj"])
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    expected = theirs(dequantised(model))
    assert_near(logits_of(model), expected)
    assert_near(logits_of(model, FastStep), expected)


@pytest.mark.long
@kernel
def test_a_model_all_of_whose_weights_learned(with_kernels):
    model = add_adapter(small(), "full")
    assert_near(logits_of(model, FastStep), theirs(small()))


@pytest.mark.parametrize("make, reason", REFUSED.values(), ids=REFUSED)
def test_what_it_would_get_wrong_is_refused(make, reason):
    with pytest.raises(UnlikeLlama, match=reason):
        read_stack(make())
