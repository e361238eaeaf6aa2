"""The layer against its definition: products, gradients, dtypes, moves, files, and no difference between modes."""

import pytest
import torch
from torch import nn

from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.quant.quantize import QuantizedTensor, dequantize, quantize

pytestmark = pytest.mark.usefixtures("outcome")  # whichever routine multiplies
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer(bias: bool = True, double_quant: bool = True) -> Linear4bit:
    g = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(24, 40, generator=g), block_size=32, double_quant=double_quant)
    return Linear4bit(weight, nn.Parameter(torch.randn(24, generator=g)) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward_equal_a_plain_linear(dtype, bias, threads):
    ours = layer(bias)
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    plain = nn.Linear(40, 24, bias, dtype=torch.float64)
    plain.weight.data = dequantize(ours.weight, torch.float32).double()
    if bias:
        plain.bias.data = ours.bias.data.double()
    same = x.detach().double().requires_grad_()
    y, want = ours(x), plain(same)
    assert y.dtype == dtype and x.dtype == dtype
    # sums of 40 and 24 products, rounded at most three times: product, bias, and in bf16 perhaps the weight
    near = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y.double(), want, **near)
    y.sum().backward()  # a gradient that is one number, expanded: stride 0
    want.sum().backward()
    torch.testing.assert_close(x.grad.double(), same.grad, **near)


def test_without_kernels_it_is_the_definition(monkeypatch):
    monkeypatch.setenv("QLORA_LAB_KERNELS", "reference")
    ours = layer(bias=False)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = ours(x)
    assert torch.equal(y, x @ dequantize(ours.weight).t())
    y.backward(torch.ones(5, 24))
    assert torch.equal(x.grad, torch.ones(5, 24) @ dequantize(ours.weight))


@pytest.mark.parametrize("tokens", [1, 5, 30])
def test_whole_blocks_train_too(tokens, threads):
    """Rows of whole blocks, which the product of a few tokens takes; a strided x; a gradient as in training."""
    ours = Linear4bit(quantize(torch.randn(48, 128, generator=torch.Generator().manual_seed(0)), double_quant=True))
    weight = dequantize(ours.weight).double()
    x = torch.randn(128, tokens, generator=torch.Generator().manual_seed(1)).t().requires_grad_()
    y = ours(x)
    torch.testing.assert_close(y.double(), x.double() @ weight.t(), rtol=1e-5, atol=1e-4)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), 2 * y.detach().double() @ weight, rtol=1e-5, atol=1e-3)


def test_the_result_may_be_changed_in_place():
    for ours in (layer(bias=False), Linear4bit(quantize(torch.ones(48, 128)))):
        for tokens in (1, 5, 30):
            x = torch.ones(tokens, ours.in_features, requires_grad=True)
            y = ours(x)
            y += 1
            nn.ReLU(inplace=True)(y).sum().backward()
            assert x.grad is not None


@pytest.mark.parametrize("kernels", ["", "reference"])
def test_autocast_decides_the_dtype(kernels, monkeypatch):
    monkeypatch.setenv("QLORA_LAB_KERNELS", kernels)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer()(torch.ones(3, 40)).dtype == torch.bfloat16


def test_a_wrong_input_is_named():
    for wrong in (torch.ones(3, 41), torch.ones(2, 3, 24), torch.ones(0)):
        with pytest.raises(ValueError, match=r"input has shape \(.*\), but its last dimension must be 40"):
            layer()(wrong)


def test_no_tokens_and_no_batch():
    ours = layer()
    assert ours(torch.ones(0, 40)).shape == (0, 24) and ours(torch.ones(40)).shape == (24,)
    assert torch.equal(ours(torch.ones(2, 0, 40)), torch.ones(2, 0, 24))


def test_gradient_is_the_derivative():
    ours = layer().requires_grad_(False)
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    step = torch.zeros(1, 40)
    step[0, 7] = 0.5
    ours(x).sum().backward()
    torch.testing.assert_close(
        (ours(x + step) - ours(x - step)).sum().item(), x.grad[0, 7].item(), rtol=1e-4, atol=1e-4
    )


def test_backward_keeps_only_packed_bytes():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        y = layer(bias=False)(torch.randn(8, 40, requires_grad=True))
    assert saved == [] and y.requires_grad
    assert set(vars(y.grad_fn)) == {"weight"} and isinstance(y.grad_fn.weight, QuantizedTensor)


def test_the_weight_is_no_parameter():
    names = [n for n, _ in layer().named_parameters()]
    assert names == ["bias"]


def test_casting_leaves_bytes_and_constants_alone():
    ours = layer()
    before = dequantize(ours.weight, torch.float32)
    for cast in (ours.half, ours.bfloat16, ours.double, ours.float):
        cast()
        assert torch.equal(dequantize(ours.weight, torch.float32), before)
    assert ours.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("double_quant", [True, False])
def test_state_dict_round_trip(double_quant):
    ours, other = layer(double_quant=double_quant), layer(double_quant=double_quant)
    other.weight = quantize(torch.zeros(24, 40), block_size=32)
    other.load_state_dict(ours.state_dict())
    x = torch.ones(1, 40)
    assert torch.equal(other(x), ours(x))
    assert any("quant_state.bitsandbytes__nf4" in k for k in ours.state_dict())


def test_damaged_state_is_named():
    ours, state = layer(), layer().state_dict()
    with pytest.raises(RuntimeError, match="weight.absmax is missing"):
        ours.load_state_dict({k: v for k, v in state.items() if k != "weight.absmax"})
    with pytest.raises(RuntimeError, match="Unexpected key.*stray"):
        ours.load_state_dict(state | {"stray": torch.ones(1)})
    small = Linear4bit(quantize(torch.ones(2, 40)))
    with pytest.raises(RuntimeError, match=r"weight has shape \(2, 40\), but the layer has \(24, 40\)"):
        ours.load_state_dict(small.state_dict() | {"bias": torch.ones(24)})


def test_using_a_layer_changes_nothing():
    """bitsandbytes repacks its weight in eval() where a CPU has AVX512-BF16, and then saves something else."""
    ours = layer()
    x = torch.ones(1, 40, dtype=torch.bfloat16)
    before, first = {k: v.clone() for k, v in ours.state_dict().items()}, ours(x)
    for mode in (True, False, True):
        ours.train(mode)
        with torch.inference_mode():
            assert torch.equal(ours(x), first)
        ours(x.clone().requires_grad_()).sum().backward()
    after = ours.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_quantize_linears_replaces_all_but_the_head():
    model = nn.Sequential()
    model.add_module("up", nn.Linear(64, 32))
    model.add_module("lm_head", nn.Linear(32, 64))
    quantize_linears(model)
    assert type(model.up) is Linear4bit and type(model.lm_head) is nn.Linear and model.up.bias is not None


def test_errors_teach():
    with pytest.raises(ValueError, match=r"shape \(4,\), but needs \(out_features"):
        Linear4bit(quantize(torch.ones(4)))
    with pytest.raises(TypeError, match="input is torch.int64"):
        layer()(torch.ones(40, dtype=torch.int64))
    with pytest.raises(ValueError, match="no linear layer to quantise besides lm_head"):
        quantize_linears(nn.Sequential(nn.ReLU()))
    broken = nn.Sequential(nn.Linear(8, 8))
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"0.weight holds nan at index \(0, 0\)"):
        quantize_linears(broken)


def biogpt():
    from transformers import BioGptConfig, BioGptForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BioGptForCausalLM(BioGptConfig(vocab_size=40, max_position_embeddings=32, **shape))


def test_a_head_of_another_name_is_neither_quantised_nor_adapted():
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(biogpt(), LoraConfig(target_modules="all-linear"))
    model = quantize_linears(biogpt(), block_size=16)
    assert type(model.output_projection) is nn.Linear
    adapted = {f"base_model.model.{path}" for path in adapters(add_lora(model, r=2))}
    assert adapted == {path for path, module in theirs.named_modules() if hasattr(module, "lora_A")}


def test_a_weight_that_the_family_uses_itself_is_neither_packed_nor_adapted():
    """Mamba multiplies by dt_proj.weight, and hands three more to its kernels; RWKV scales two in place."""
    from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

    mamba = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1))
    rwkv = RwkvForCausalLM(RwkvConfig(vocab_size=40, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2))
    for model, packed in ((mamba, {"in_proj"}), (rwkv, {"key", "receptance"})):
        quantize_linears(model, block_size=16)
        layers = {path.split(".")[-1] for path, layer in model.named_modules() if isinstance(layer, Linear4bit)}
        assert {path.split(".")[-1] for path in adapters(add_lora(model, r=2))} == packed
        assert layers == packed and model.eval()(torch.arange(9)[None]).logits.isfinite().all()


def test_a_router_that_is_a_linear_layer_is_not_adapted():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    shape = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 8}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(vocab_size=40, pad_token_id=1, **shape))
    paths = adapters(add_lora(quantize_linears(model, block_size=16), r=2))
    assert "model.layers.0.self_attn.q_proj" in paths and "model.layers.0.feed_forward.router" not in paths
    assert model.eval()(torch.arange(9)[None]).logits.isfinite().all()
