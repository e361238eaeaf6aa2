"""The first value that is not finite is named, each place in turn, and nothing is left behind."""

import pytest
import torch
from torch import nn

from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.train.nonfinite import NonFinite, first_nonfinite

MLP = "model.layers.1.mlp"


@pytest.fixture
def model(tiny_llama):
    add_lora(quantize_linears(tiny_llama), r=4, dropout=0.1)
    for layer in adapters(tiny_llama).values():
        layer.lora_B.data.fill_(0.01)
    return tiny_llama.train()


@pytest.fixture
def batch():
    ids = torch.arange(20).view(2, 10) + 3
    labels = torch.where(torch.arange(10) > 5, ids, -100)
    return {"input_ids": ids, "attention_mask": torch.ones(2, 10, dtype=torch.long), "labels": labels}


@pytest.fixture(params=[False, True], ids=["", "checkpointed"])
def checkpointed(request, model):
    if request.param:
        model.activation_checkpointing_enable()
    return request.param


class Root(nn.Module):
    """Zero, with a slope that is infinite there."""

    def forward(self, x):
        return (x - x.detach()).sqrt()


def test_a_sound_model_has_none(model, batch, checkpointed):
    assert first_nonfinite(model, batch) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sound_model_has_none_in_16_bits(model, batch, dtype):
    model.model.embed_tokens.weight.data.clamp_(-0.1, 0.1)
    assert first_nonfinite(model.to(dtype), batch) is None


def test_parameters_come_first(model, batch):
    model.model.layers[1].mlp.up_proj.lora_A.data[1, 2] = torch.nan
    model.model.norm.weight.data[:3] = torch.inf
    found = first_nonfinite(model, batch)
    assert found == NonFinite("parameter", f"{MLP}.up_proj.lora_A", "float32", 1, 4 * 16, None)
    assert str(found) == f"the parameter {MLP}.up_proj.lora_A, float32, has 1 of 64 values not finite"


@pytest.mark.parametrize("double_quant", [False, True])
def test_constants_of_a_4_bit_weight(tiny_llama, batch, double_quant):
    quantize_linears(tiny_llama, double_quant=double_quant)
    constants = tiny_llama.model.layers[0].mlp.down_proj.weight.constants
    (constants.absmax_offset if double_quant else constants[3:5]).fill_(torch.nan)
    found = first_nonfinite(tiny_llama, batch)
    assert (found.name, found.total) == ("model.layers.0.mlp.down_proj.weight.absmax", 512 // 64)
    assert found.bad == (8 if double_quant else 2)


def test_an_overflow_of_float16_in_a_layer(model, batch, checkpointed):
    """Finite weights, finite input: the product leaves the range."""
    model.half()
    down = model.model.layers[1].mlp.down_proj
    down.base.weight.constants.absmax_offset.fill_(6e4)  # about this times each level and each input, summed up
    entering = []
    hook = down.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0].abs().max().item()))
    found = first_nonfinite(model.eval(), batch)  # eval: dropout would scale what the adapter sees, not the base
    hook.remove()
    assert (found.kind, found.name, found.dtype) == ("output", f"{MLP}.down_proj", "float16")
    assert found.largest == entering[0] < 65504 and 0 < found.bad <= found.total == 2 * 10 * 16
    sentence = f"the output of {MLP}.down_proj, float16, has {found.bad} of 320 values not finite"
    hint = f"(the largest that entered is {entering[0]:.1e}; float16 ends at 65,504: use bfloat16 or float32)"
    assert str(found) == f"{sentence} {hint}"


def test_an_overflow_in_the_adapter_is_the_adapters(model, batch):
    model.model.layers[0].self_attn.o_proj.lora_B.data.fill_(3e38)
    found = first_nonfinite(model, batch)
    assert (found.kind, found.name) == ("output", "model.layers.0.self_attn.o_proj")


def test_what_a_module_computes_between_two_layers(model, batch):
    """act(gate) * up overflows: no layer returned it, down_proj is handed it."""
    mlp = model.model.layers[1].mlp.half()
    model.half()
    for name in ("gate_proj", "up_proj"):
        mlp.get_submodule(name).register_forward_hook(lambda _, inputs, output: torch.full_like(output, 300.0))
    found = first_nonfinite(model, batch)
    assert (found.kind, found.name, found.bad) == ("input", f"{MLP}.down_proj", 2 * 10 * 32)
    assert str(found).startswith(f"what is computed for {MLP}.down_proj, float16, has 640 of 640 values not finite")


def test_a_gradient(model, batch, checkpointed):
    model.model.layers[1].mlp.act_fn = Root()
    found = first_nonfinite(model, batch)
    assert (found.kind, found.name) == ("gradient", f"the output of {MLP}.gate_proj")
    assert found.bad == found.total == 2 * 10 * 32 and 0 < found.largest < 1e3


def test_the_gradient_of_a_parameter(model, batch):
    model.model.layers[1].mlp.down_proj.lora_B.register_hook(lambda gradient: gradient / 0)
    found = first_nonfinite(model, batch)
    assert (found.kind, found.name, found.bad) == ("gradient", f"{MLP}.down_proj.lora_B", 16 * 4)
    assert str(found).startswith(f"the gradient of {MLP}.down_proj.lora_B, float32, has 64 of 64 values not finite")


def test_the_loss_itself(tiny_llama, batch):
    tiny_llama.lm_head.register_forward_hook(lambda _, inputs, output: torch.where(output > 0, 3e38, -3e38))
    found = first_nonfinite(tiny_llama, batch)
    assert (found.kind, found.name, found.bad, found.total) == ("output", "loss", 1, 1)
    assert str(found) == "the output of loss, float32, has 1 of 1 value not finite"


@pytest.mark.parametrize("broken", [False, True])
def test_nothing_is_left_behind(model, batch, checkpointed, broken):
    if broken:
        model.model.layers[1].mlp.act_fn = Root()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable[:3]:
        p.grad = torch.full_like(p, 2.0)
    values = {n: p.clone() for n, p in model.state_dict().items()}
    grads, flags = [p.grad for p in model.parameters()], [m.training for m in model.modules()]
    random, hooks = torch.get_rng_state(), hook_counts(model)
    assert (first_nonfinite(model, batch) is not None) == broken
    assert all(torch.equal(p, values[n]) for n, p in model.state_dict().items())
    assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    assert all((p.grad == 2).all() for p in trainable[:3])
    assert flags == [m.training for m in model.modules()] and hooks == hook_counts(model)
    assert torch.equal(random, torch.get_rng_state())


def hook_counts(model):
    modules = [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()]
    return modules, [len(p._backward_hooks or ()) for p in model.parameters()]


def test_nothing_is_left_behind_by_an_error(model, batch):
    hooks = hook_counts(model)
    with pytest.raises(IndexError):
        first_nonfinite(model, batch | {"input_ids": batch["input_ids"] + 10**6})
    assert hooks == hook_counts(model)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_each_kind_of_bad_value(tiny_llama, batch, bad):
    tiny_llama.model.norm.weight.data[5] = bad
    assert first_nonfinite(tiny_llama, batch).name == "model.norm.weight"


def test_a_model_without_anything_to_train(tiny_llama, batch):
    assert first_nonfinite(tiny_llama.requires_grad_(False), batch) is None
