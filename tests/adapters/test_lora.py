"""The adapter: zero at the start, PEFT's start values, the right layers, the right gradients."""

import pytest
import torch
from torch import nn

from qlora_lab.adapters.lora import LoRALinear, adapters, add_lora
from qlora_lab.adapters.targets import linear_layers
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.quantize import dequantize, quantize

pytestmark = pytest.mark.usefixtures("outcome")  # whichever routine multiplies the base


def model() -> nn.Module:
    torch.manual_seed(0)
    block = lambda: nn.ModuleDict({"q_proj": nn.Linear(16, 16), "v_proj": nn.Linear(16, 8), "norm": nn.LayerNorm(16)})  # noqa: E731
    return nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "lm_head": nn.Linear(16, 32)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantised", [False, True])
def test_starts_exactly_as_the_base(quantised, dtype):
    base = nn.Linear(32, 16).to(dtype)
    base = Linear4bit(quantize(base.weight), base.bias) if quantised else base
    x = torch.randn(4, 32).to(dtype)
    assert torch.equal(LoRALinear(base, r=4)(x), base(x))


def test_computes_its_definition():
    base = nn.Linear(32, 16)
    lora = LoRALinear(base, r=4, alpha=10)
    nn.init.normal_(lora.lora_B)
    x = torch.randn(5, 32)
    want = x @ (base.weight + 10 / 4 * lora.lora_B @ lora.lora_A).t() + base.bias
    torch.testing.assert_close(lora(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [4, 200])  # less than the layer has rows and columns, and more, as PEFT allows
@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])  # with dropout the formula runs, without it one pass over x
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [3, 40])  # few tokens have a product of their own
def test_gradients_are_those_of_the_definition(tokens, dtype, dropout, kernels, r, threads, monkeypatch):
    monkeypatch.setenv("QLORA_LAB_KERNELS", kernels)
    g = torch.Generator().manual_seed(0)
    base = Linear4bit(quantize(torch.randn(24, 128, generator=g)), nn.Parameter(torch.randn(24, generator=g)))
    lora = LoRALinear(base, r=r, alpha=10, dropout=dropout, generator=g)
    nn.init.normal_(lora.lora_B, generator=g)
    x = torch.randn(2, tokens, 128, generator=g).to(dtype).requires_grad_()
    y = lora(x)
    up = torch.randn(y.shape, generator=g).to(dtype)
    y.backward(up)

    exact, A, B = (p.detach().double().requires_grad_() for p in (x, lora.lora_A, lora.lora_B))
    W = dequantize(base.weight, torch.float32).double()
    want = exact @ (W + 10 / r * B @ A).t() + base.bias.double()
    want.backward(up.double())
    assert (y.dtype, x.grad.dtype, lora.lora_A.grad.dtype, lora.lora_B.grad.dtype) == (
        dtype,
        dtype,
        *[torch.float32] * 2,
    )
    for ours, theirs in ((y, want), (x.grad, exact.grad), (lora.lora_A.grad, A.grad), (lora.lora_B.grad, B.grad)):
        # a few roundings, and float32 sums of 128 + r terms in any order: against the largest value, as terms cancel
        bound = 4 * torch.finfo(dtype).eps + (128 + r) * 2.0**-24
        assert (ours.double() - theirs).abs().max() < bound * theirs.abs().max()


@pytest.mark.usefixtures("with_kernels")
def test_x_is_kept_once_and_the_first_layer_needs_no_gradient():
    lora = LoRALinear(Linear4bit(quantize(torch.ones(64, 128))), r=4)
    nn.init.ones_(lora.lora_B)
    kept = []
    x = torch.ones(40, 128, dtype=torch.bfloat16)  # as an embedding gives it: frozen
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora(x)
    assert sum(t.nbytes for t in kept) == x.nbytes + 4 * (40 * 4 + 4 * 128 + 64 * 4)  # x A^T, A and B in float32
    y.backward(torch.ones_like(y))
    assert torch.allclose(lora.lora_A.grad, torch.full((4, 128), 64 * 40 * 4.0)), "scaling is 16 / 4"
    assert torch.allclose(lora.lora_B.grad, 40 * 4.0 * lora.lora_A.detach().sum(1).expand(64, 4), rtol=1e-4)


@pytest.mark.usefixtures("with_kernels")
@pytest.mark.parametrize("tokens", [3, 40])
def test_adapter_products_are_float32(tokens, threads):
    """bf16 inputs, exact sums: whatever the base's routine rounds, the adapter's own products and gradients are not."""
    g = torch.Generator().manual_seed(0)
    lora = LoRALinear(Linear4bit(quantize(torch.zeros(64, 128))), r=4, alpha=4, generator=g)
    nn.init.normal_(lora.lora_B, generator=g)
    x, up = (torch.randn(tokens, n, generator=g).bfloat16() for n in (128, 64))
    y = lora(x)
    y.backward(up)
    A, B = lora.lora_A.detach().double(), lora.lora_B.detach().double()
    low = x.double() @ A.t()
    near = {"rtol": 0, "atol": 2.0**-19 * 128}  # float32 sums of at most 128 terms of size 1
    torch.testing.assert_close(lora.lora_B.grad.double(), up.double().t() @ low, **near)
    torch.testing.assert_close(lora.lora_A.grad.double(), (up.double() @ B).t() @ x.double(), **near)
    exact = low @ B.t()  # the base is zero, so y is rounded once
    assert ((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-19).all()


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_keeps_the_adapter_float32(enabled):
    lora = LoRALinear(Linear4bit(quantize(torch.ones(64, 128))), r=4)
    nn.init.ones_(lora.lora_B)
    x = torch.ones(40, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y = lora(x)
    y.sum().backward()
    assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
    assert x.grad.dtype == lora.lora_A.grad.dtype == lora.lora_B.grad.dtype == torch.float32


def test_lora_A_starts_within_one_over_root_in_features():
    A = LoRALinear(nn.Linear(256, 64), r=16).lora_A
    assert A.shape == (16, 256) and 0.95 / 16 < A.abs().max() <= 1 / 16


def test_only_the_adapter_trains():
    m = add_lora(model(), r=2)
    assert {n.split(".")[-1] for n, p in m.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert len(adapters(m)) == 4 and type(m["lm_head"]) is nn.Linear


def test_every_adapter_moves_in_two_steps():
    """B gets a gradient at once; A only after B has left zero."""
    m = add_lora(model(), r=2)
    opt = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    before = {n: p.clone() for n, p in m.named_parameters()}
    for _ in range(2):
        opt.zero_grad()
        x = torch.ones(1, 16)
        for block in m["layers"]:
            x = block["norm"](block["q_proj"](x)) + block["v_proj"](x).repeat(1, 2)
        (x - torch.arange(16.0)).square().sum().backward()
        opt.step()
    moved = {n for n, p in m.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}


@pytest.mark.parametrize(
    "targets, n",
    [("all-linear", 4), ("q_proj", 2), (["q_proj", "v_proj"], 4), (["layers.1.v_proj"], 1), ("lm_head", 1)],
)
def test_targets(targets, n):
    assert len(adapters(add_lora(model(), r=2, targets=targets))) == n


@pytest.mark.parametrize("r", [1, 17, 256])
def test_a_rank_may_exceed_a_layer(r):
    """PEFT allows it. A gate of one expert is 1 x 16, and SmolLM2's k_proj 192 x 576."""
    m = nn.ModuleDict({"shared_expert_gate": nn.Linear(16, 1), "k_proj": nn.Linear(16, 12)})
    shapes = {name: (layer.lora_A.shape, layer.lora_B.shape) for name, layer in adapters(add_lora(m, r=r)).items()}
    assert shapes == {"shared_expert_gate": ((r, 16), (1, r)), "k_proj": ((r, 16), (12, r))}


def test_linear_layers_keep_their_paths_when_they_are_adapted():
    m = model()
    before = linear_layers(m)
    assert list(before)[-1] == "lm_head" and len(before) == 5
    after = linear_layers(add_lora(m, r=2, targets=["q_proj", "lm_head"]))
    assert list(after) == list(before) and all(after[path] is before[path] for path in before)


def test_same_seed_same_start_and_no_trace_in_the_global_generator():
    a, b, base = add_lora(model(), r=2), add_lora(model(), r=2), model()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    state = torch.get_rng_state()
    add_lora(base, r=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_acts_only_on_the_adapter_and_only_in_training():
    lora = LoRALinear(nn.Linear(32, 32), r=4, dropout=0.5)
    nn.init.ones_(lora.lora_B)
    x = torch.ones(1, 32)
    assert not torch.equal(lora.train()(x), lora(x))
    assert torch.equal(lora.eval()(x), lora(x))


def test_adapter_stays_float32():
    lora = LoRALinear(nn.Linear(8, 8), r=2)
    lora(torch.ones(1, 8)).sum().backward()
    exact, gradient = lora.lora_A.detach().clone(), lora.lora_B.grad.clone()
    lora.bfloat16()
    assert torch.equal(lora.lora_A, exact) and torch.equal(lora.lora_B.grad, gradient)
    assert lora.lora_A.dtype == torch.float32 and lora.base.weight.dtype == torch.bfloat16
    assert lora.to("meta").lora_A.is_meta


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"r": 0}, "r=0 is not allowed: it is a whole number of at least 1"),
        ({"r": 2.0}, "r=2.0 is not allowed"),
        ({"r": 2**31}, "r=2147483648 is not allowed: it is a whole number of at most 2,147,483,647"),
        ({"alpha": 0}, "alpha=0 is not allowed: it is a number above 0 and at most 1,000,000"),
        ({"alpha": 1e7}, "alpha=10000000.0 is not allowed: it is a number above 0 and at most 1,000,000"),
        ({"alpha": float("nan")}, "alpha=nan is not allowed"),
        ({"alpha": "16"}, "alpha='16' is not allowed"),
        ({"dropout": 1.0}, "dropout=1.0 is not allowed: it is a number from 0 to below 1"),
        ({"dropout": False}, "dropout=False is not allowed"),
        (
            {"targets": ["qproj"]},
            "targets \\['qproj'\\] match no linear layer: choose 'all-linear', .* or from lm_head, q_proj, v_proj",
        ),
        ({"targets": []}, "targets none match"),
    ],
)
def test_errors_teach_and_leave_the_model_alone(kwargs, message):
    m = model()
    with pytest.raises(ValueError, match=message):
        add_lora(m, **{"r": 2, **kwargs})
    assert not any(isinstance(x, LoRALinear) for x in m.modules()) and all(p.requires_grad for p in m.parameters())


def test_a_model_without_a_layer_to_adapt_is_refused_and_left_alone():
    """It would be frozen, with nothing left to train."""
    m = nn.ModuleDict({"c_attn": nn.Conv1d(8, 8, 1), "lm_head": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="ModuleDict has no linear layer besides its head: choose a model"):
        add_lora(m, r=2)
    assert all(p.requires_grad for p in m.parameters())
    assert list(adapters(add_lora(m, r=2, targets="lm_head"))) == ["lm_head"]


def test_a_layer_whose_source_cannot_be_read_is_adapted():
    """A class typed at Python's prompt has none, and neither has a compiled one."""
    typed = {"Linear": nn.Linear}
    exec("class Mine(Linear):\n    def forward(self, x):\n        return super().forward(x)", typed)
    m = nn.ModuleDict({"proj": typed["Mine"](8, 8)})
    assert list(adapters(add_lora(m, r=2))) == ["proj"]


def test_adapters_are_added_once():
    m = add_lora(model(), r=2)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(m)
    with pytest.raises(ValueError, match="no adapter: call qlora_lab.add_adapter"):
        adapters(model())
