"""Our models in torch.compile and torch.export: whole graphs, and the same bits as without them."""

import shutil

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lab.adapters.lora import LoRALinear, add_lora
from qlora_lab.model import product_ops
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.model.wide import WideHead, widen
from qlora_lab.quant.quantize import quantize

pytestmark = [
    pytest.mark.slow,  # torch.compile alone takes a second to import
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of what it does itself
    pytest.mark.usefixtures("one_thread", "fresh"),
]
IDS = torch.arange(3, 43)[None]
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Two layers with rows of whole blocks, float32, in 4 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        made = LlamaForCausalLM(LlamaConfig(vocab_size=280, initializer_range=0.3, use_cache=False, **shape))
    return quantize_linears(made.eval(), block_size=32).requires_grad_(False)


def adapted(model) -> LlamaForCausalLM:
    add_lora(model, r=4)
    g = torch.Generator().manual_seed(1)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.data.normal_(0, 0.1, generator=g)
    return model.train()


def of_a_step(model) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def assert_equal(results, wanted):
    assert len(results) == len(wanted) and all(map(torch.equal, results, wanted))


def assert_near(results, wanted):
    """A few hundred float32 roundings, of about 1e-7 each: 1.6e-5 of a gradient's norm for SmolLM2-135M."""
    for result, want in zip(results, wanted, strict=True):
        assert (result - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.float32, ""), (torch.bfloat16, "reference")])
@torch.no_grad()
def test_a_compiled_model_is_one_graph_and_gives_the_same_bits(dtype, kernels, model, monkeypatch):
    monkeypatch.setenv("QLORA_LAB_KERNELS", kernels)
    model.to(dtype)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in (IDS, IDS[:, :1]):
        assert torch.equal(compiled(ids).logits, model(ids).logits)


def test_compiled_layers_share_one_graph_and_train_to_the_same_bits(model):
    model = adapted(model)
    before = of_a_step(model)
    torch._dynamo.utils.counters.clear()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_equal(of_a_step(model), before)
    # The first layer's input has no gradient, so it has a graph of its own.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_whole_compiled_model_trains_alike(model):
    """The loss has the same bits. A gradient that comes from several places is added up in another order."""
    model = adapted(model)
    loss, *gradients = of_a_step(model)
    same, *others = of_a_step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert torch.equal(same, loss) and len(others) == len(gradients) == 28
    assert_near(others, gradients)


@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_alike(model):
    """Inductor fuses norms and rotary embeddings, and adds up in another order: float32 rounding, no more."""
    model = adapted(model)
    loss, *gradients = of_a_step(model)
    model.model.layers[1].compile(fullgraph=True)
    same, *others = of_a_step(model)
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=0)
    assert_near(others, gradients)


def test_a_bf16_model_in_wide_products(model, own_race):
    """Attention and head in float32, as on a CPU that is slow in bf16."""
    from qlora_lab.kernels import product

    product.keep(product.Race.won_by("float32"))
    model.to(torch.bfloat16)
    assert widen(model) and type(model.lm_head) is WideHead
    model = adapted(model)
    ids = IDS.repeat(2, 1)  # 80 rows: the head multiplies widened
    before = model(ids).logits
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(ids).logits, before)


@torch.no_grad()
def test_an_exported_model_gives_the_same_bits_and_comes_back_from_a_file(model, tmp_path):
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    before = [layer.weight.packed for layer in layers]
    program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    logits = model(IDS).logits
    assert torch.equal(program.module()(IDS, use_cache=False).logits, logits)
    assert all(layer.weight.packed is packed for layer, packed in zip(layers, before, strict=True))  # as it was
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(again(IDS, use_cache=False).logits, logits)


@pytest.mark.parametrize("double_quant", [False, True])
def test_operations_keep_what_they_promise(double_quant):
    """torch's own check of an operation: nothing is changed, shapes are told right, gradients pass through."""
    g = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(64, 128, generator=g), double_quant=double_quant)
    parts = product_ops.parts_of(weight)
    x = torch.randn(3, 128, generator=g, requires_grad=True)
    A, B = (torch.randn(shape, generator=g, requires_grad=True) for shape in ((4, 128), (64, 4)))
    torch.library.opcheck(product_ops.forward_4bit, (x, *parts))
    torch.library.opcheck(product_ops.forward_adapted, (x, *parts, A, B, 0.5))
    torch.library.opcheck(product_ops.forward_adapted, (x.detach(), *parts, A, B, 0.5))
    torch.library.opcheck(product_ops.forward_wide, (x, nn.Linear(128, 64).weight.detach().bfloat16()))
