"""torch.compile of single layers, and of functions whose kernels run between its graphs: the same results."""

import pytest
import torch

from qlora_lab.adapters.lora import LoRALinear
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.quant.quantize import dequantize, quantize

pytestmark = [
    pytest.mark.slow,  # torch.compile alone takes a second to import
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of what it does itself
]


@pytest.fixture(params=["eager", "aot_eager"])  # neither needs a C++ compiler
def compiled(request):
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend=request.param)
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("adapted", [False, True])
def test_layers(compiled, adapted, tokens):
    g = torch.Generator().manual_seed(0)
    layer = Linear4bit(quantize(torch.randn(64, 128, generator=g), double_quant=True))
    if adapted:
        layer = LoRALinear(layer, r=4, generator=g)
        torch.nn.init.ones_(layer.lora_B)
    x = torch.randn(tokens, 128, generator=g)
    results = []
    for run in (layer, compiled(layer)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = run(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(compiled(layer)(x), layer(x))


@pytest.mark.parametrize("double_quant", [False, True])
def test_quantise_and_dequantise(compiled, double_quant):
    def there_and_back(weight):
        return dequantize(quantize(weight, double_quant=double_quant), torch.bfloat16)

    weight = torch.randn(640, generator=torch.Generator().manual_seed(0))
    assert torch.equal(compiled(there_and_back)(weight), there_and_back(weight))


def test_a_step_of_adamw_with_8_bits(compiled):
    results = []
    for wrap in (lambda function: function, compiled):
        parameter = torch.nn.Parameter(torch.ones(300))
        optimizer = PagedAdamW([parameter], lr=0.1, bits=8)

        def step(parameter=parameter, optimizer=optimizer):
            parameter.grad = torch.arange(300.0)
            optimizer.step()

        wrap(step)()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)
