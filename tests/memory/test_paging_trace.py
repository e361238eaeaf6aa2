"""Counted pages are those of the real optimizer and the real Pages; sizes are those of real models, by their names."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lab.adapters.lora import add_lora
from qlora_lab.memory import paging_trace as T
from qlora_lab.memory.shape import Shape
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.optim.paging import Pages

MODELS = {"LLaMA-7B": T.LLAMA_7B, "SmolLM2-135M": T.SMOLLM2_135M}
TOY = Shape("toy", "llama", 2, 4, 8, 2, 1, 2, 10, tied=False)
SIZES = st.lists(st.integers(1, 800), min_size=1, max_size=4)
BITS_AND_PAGE = st.tuples(st.sampled_from([32, 8]), st.sampled_from([520, 1000, 4096]))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_sizes_are_those_of_add_lora(model):
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_hidden_layers=2,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads,
    )
    with torch.device("meta"):
        real = LlamaForCausalLM(config)
    trained = [p.numel() for p in add_lora(real, r=3).parameters() if p.requires_grad]
    assert trained == T.adapter(replace(model, layers=2), 3)


def test_llama_7b_has_its_published_number_of_parameters():
    norms = 65 * 4096
    assert T.fixed_bytes(T.LLAMA_7B, 0, 16) == 2 * (6_738_415_616 - norms)


@pytest.mark.parametrize(
    ("model", "shares"),
    [  # by hand, LLaMA-7B: 11 sides of 4096 and 3 of 11008 for each layer and rank
        ("LLaMA-7B", {1: 0, 9: 0, 10: 3 * 11008 / (11 * 4096 + 3 * 11008), 24: 0.42295, 25: 1, 64: 1}),
        ("SmolLM2-135M", {64: 0, 65: 0, 66: 3 * 1536 / (9 * 576 + 2 * 192 + 3 * 1536)}),
    ],
)
def test_what_peers_can_page(model, shares):
    for r, share in shares.items():
        assert T.pageable_share(T.adapter(MODELS[model], r)) == pytest.approx(share, abs=1e-5), r


def test_the_rule_of_peers_is_theirs(monkeypatch):
    """bitsandbytes' own function, asked for a tensor on a GPU that is not here."""
    optimizer = pytest.importorskip("bitsandbytes.optim.optimizer")
    asked = []
    monkeypatch.setattr(optimizer.F, "get_paged", lambda *shape, **_: asked.append(shape[0]))
    monkeypatch.setattr(optimizer.F, "fill", lambda *_: None)
    monkeypatch.setattr(optimizer.torch, "zeros_like", lambda *_, **__: None)
    its = SimpleNamespace(is_paged=True, page_mng=SimpleNamespace(paged_tensors=[]))
    for numel in (T.PEERS_LEAST - 1, T.PEERS_LEAST):
        tensor = SimpleNamespace(device=torch.device("cuda"), numel=lambda n=numel: n, shape=(numel,))
        optimizer.Optimizer8bit.get_state_buffer(its, tensor, torch.uint8)
    assert asked == [T.PEERS_LEAST]


@settings(max_examples=15)
@given(SIZES, BITS_AND_PAGE)
def test_pages_are_those_of_the_optimizer_and_a_step_asks_in_order(sizes, bits_and_page):
    bits, page_size = bits_and_page
    params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
    optimizer = PagedAdamW(params, bits=bits, page_size=page_size)
    assert T.state_pages(sizes, bits, page_size) == optimizer.pages.count
    asked, page = [], optimizer.pages.page
    optimizer.pages.page = lambda number: asked.append(number) or page(number)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert list(dict.fromkeys(asked)) == list(range(optimizer.pages.count)) and asked == sorted(asked)


def test_8_bits_take_a_quarter():
    n = 256 * 1000
    assert T.state_bytes([n], 32) == 8 * n and T.state_bytes([n], 8) == (2 + 8 / 256) * n


@pytest.mark.long
@given(st.lists(st.integers(0, 8), max_size=40), st.integers(1, 9))
def test_replay_is_what_pages_does(asked, frames):
    pages = Pages(9, 1, frames)
    for number in asked:
        pages.page(number)
    accesses, table = T.replay(asked, frames)
    assert list(table) == pages.resident
    moved = [(event.kind, event.page, event.frame) for event in pages.events if event.kind in ("fault", "evict")]
    expected = []
    for one in accesses:
        if one.evicted is not None:
            expected.append(("evict", one.evicted, one.frame))
        if one.fault:
            expected.append(("fault", one.page, one.frame))
    assert moved == expected


@pytest.mark.parametrize("frames", range(1, 8))
def test_in_order_every_access_faults_until_all_fit(frames):
    assert T.faults_of_a_step(range(7), frames) == (0 if frames == 7 else 7)


def test_a_mixture_is_refused():
    mixture = replace(TOY, name="m", family="mixtral", experts=4, experts_per_token=2)
    with pytest.raises(ValueError, match="m is a mixture of experts, which predict_memory counts: give a dense model"):
        T.fixed_bytes(mixture, 8, 4.127)


def test_bandwidth_is_the_published_one():
    assert [round(T.pcie_bandwidth(g) / 1e9, 1) for g in (3, 4, 5)] == [15.8, 31.5, 63.0]
    # bitsandbytes' maintainers: 1 GB evicted a step costs 125 ms on 16 lanes of 3.0 at best (their issue 962)
    assert 2 * 1e9 / T.pcie_bandwidth(3) == pytest.approx(0.125, rel=0.02)
    with pytest.raises(ValueError, match="generation=2 is not known: choose from 3, 4, 5"):
        T.pcie_bandwidth(2)


def test_bytes_of_a_toy_by_hand():
    weights = 2 * (4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 8 * 4 + 8 * 4 + 4 * 8)  # q, k, v, o, gate, up, down
    lora = 2 * 3 * (8 + 6 + 6 + 8 + 12 + 12 + 12)  # r times in + out
    assert T.fixed_bytes(TOY, 3, 4.5) == weights * 4.5 / 8 + 2 * 2 * 10 * 4 + 8 * lora
    assert T.fixed_bytes(replace(TOY, tied=True), 3, 4.5) == T.fixed_bytes(TOY, 3, 4.5) - 2 * 10 * 4
    layer = 2 * (5 * 4 + 2 * 2 + 4 * 8)  # more than the head's 8 * 10
    assert T.activation_bytes(TOY, 5) == 5 * (2 * 2 * 4 + layer)
    assert T.activation_bytes(replace(TOY, vocabulary=100), 5) == 5 * (2 * 2 * 4 + 8 * 100)


def test_a_long_batch_moves_what_it_needs_and_no_more():
    calm, long, again = T.timeline([30, 60, 30], state=60, room=100, page_size=10)  # 6 pages of state, 10 frames
    assert calm == T.Moment(30, stayed=6, left=0, fetched=0)
    assert long == T.Moment(60, stayed=4, left=2, fetched=2)
    assert again == calm


@settings(max_examples=15)
@given(st.lists(st.integers(0, 100), min_size=1, max_size=8), st.integers(1, 100))
def test_any_timeline(activations, state):
    for nbytes, one in zip(activations, T.timeline(activations, state, 100, 10), strict=True):
        count, frames = -(-state // 10), 10 - -(-nbytes // 10)
        assert one == T.Moment(nbytes, min(count, frames), max(0, count - frames), max(0, count - frames))


def test_activations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="activations of 101 bytes do not fit in 100"):
        T.timeline([101], state=60, room=100, page_size=10)
