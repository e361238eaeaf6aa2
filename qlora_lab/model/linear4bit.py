"""A linear layer whose frozen weight stays packed: y = x dequantize(W)^T + bias.

In: x, (..., in_features) float32, bf16 or fp16. Out: y, (..., out_features), same dtype.
Source: QLoRA section 3, equation 5. The weight is dequantised, used, and dropped. Backward dequantises it again instead
of keeping it, so 0.5 byte a weight stays in memory, not 2 or 4. The frozen weight has no gradient, so x is not kept
either, unless an adapter (lora_linear.py) needs it. The CPU kernels decode it one panel at a time
(kernels/product.py). There is no second derivative.

But: unlike bitsandbytes, no inference mode repacks the weight. What a layer computes and saves never depends on
train() or eval().
"""

import inspect
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from qlora_lab.model import product_4bit, product_ops
from qlora_lab.model.experts import gates
from qlora_lab.model.language_model import beside, chosen_parts
from qlora_lab.model.layer_kinds import as_matrix, is_conv1d, is_product, is_turned
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.quant.plan import Candidate, Plan, as_plan, of_layers
from qlora_lab.quant.quantize import QuantizedTensor, dequantize, quantize

HEAD = "lm_head"  # the output layer in most models of transformers; neither quantised nor adapted
# `self.dt_proj.weight @ x`, `out_proj=self.out_proj.weight,`: code that uses a weight itself cannot use a packed one
DIRECT_USE = re.compile(
    r"^(?!.*\binit\.).*(?<!module)\.(\w+)\.weight(?= @|,$|\)|\.t\(|\.mul_|\.div_|\.type\()", re.MULTILINE
)


class _MatMul4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
        ctx.weight = weight  # packed bytes, shared with the layer: no copy, and x is not kept
        return product_4bit.forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        return product_4bit.backward(grad, ctx.weight), None


class _AdaptedMatMul4bit(torch.autograd.Function):
    """x W^T + scaling (x A^T) B^T in one pass over x on the CPU. Keeps x as it came, and x A^T, for backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: QuantizedTensor, A: torch.Tensor, B: torch.Tensor, scaling: float):
        ctx.weight = weight
        ctx.scaling = scaling
        y, low = product_4bit.forward_adapted(x, weight, A, B, scaling)
        ctx.save_for_backward(x, low, A, B)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor):
        gradients = product_4bit.backward_adapted(
            grad, ctx.saved_tensors, ctx.weight, ctx.scaling, ctx.needs_input_grad[0]
        )
        grad_x, grad_A, grad_B = gradients
        return grad_x, None, grad_A, grad_B, None


def _traced(tokens: torch.Tensor, weight: QuantizedTensor, adapter: tuple | None) -> torch.Tensor:
    """The same products as operations, which torch.compile and torch.export leave whole."""
    parts = product_ops.parts_of(weight)
    if adapter is None:
        return product_ops.forward_4bit(tokens, *parts)
    return product_ops.forward_adapted(tokens, *parts, *adapter)[0]


def product(tokens: torch.Tensor, weight: QuantizedTensor, adapter: tuple | None = None) -> torch.Tensor:
    """Return x W^T of (tokens, in_features), with its gradient where one is asked for. adapter: see Linear4bit."""
    if torch.compiler.is_compiling():
        return _traced(tokens, weight, adapter)
    if adapter is not None:
        return _AdaptedMatMul4bit.apply(tokens, weight, *adapter)  # base and adapter, one rounding
    if tokens.requires_grad and torch.is_grad_enabled():
        return _MatMul4bit.apply(tokens, weight)
    return product_4bit.forward(tokens, weight)


class Linear4bit(PackedModule):
    """`nn.Linear` over a QuantizedTensor.

    weight: quantised (out_features, in_features), frozen; packed_module.py keeps it.
    bias: (out_features,) or None. turned: the family's own layer, a Conv1D, keeps the transpose.
    Raises ValueError for a weight that is not a matrix.
    Moving the module moves the weight. Casting it (.half(), .bfloat16()) casts only the bias: packed bytes stay.
    """

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None = None, turned: bool = False):
        if len(weight.shape) != 2:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, but needs (out_features, in_features)")
        super().__init__(weight)
        self.turned = turned
        self.register_parameter("bias", bias)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def takes_adapter(self) -> bool:
        """Whether forward can add an adapter itself, as the CPU's product can."""
        return self.weight.device.type == "cpu" and product_4bit.product_of(self.weight) is not None

    def forward(self, x: torch.Tensor, adapter: tuple[torch.Tensor, torch.Tensor, float] | None = None) -> torch.Tensor:
        """adapter: (lora_A, lora_B, scaling) of lora_linear.py, added to the product; only where `takes_adapter`."""
        x = self.taken(x)
        weight = self.weight
        out_features, in_features = weight.shape
        tokens = x if x.dim() == 2 else x.reshape(-1, in_features)  # (tokens, in_features)
        y = product(tokens, weight, adapter)
        y = y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)  # (..., out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def decoded(layer: nn.Module) -> torch.Tensor:
    """Return the whole weight of a linear layer in float32, (out_features, in_features); not to be changed."""
    weight = layer.weight
    if isinstance(weight, QuantizedTensor):
        return dequantize(weight, torch.float32)
    return as_matrix(layer, weight).detach().float()


def is_linear(module: nn.Module) -> bool:
    """Tell whether `module` can take an adapter: any nn.Linear, a Linear4bit, or a Conv1D."""
    return isinstance(module, (nn.Linear, Linear4bit)) or is_conv1d(module)


def head_path(model: nn.Module) -> str | None:
    """Return the path of the layer that gives logits, lm_head in most models; None if there is none."""
    get = getattr(model, "get_output_embeddings", None)  # transformers' models have it
    head = get() if get else getattr(model, HEAD, None)
    return next((path for path, module in model.named_modules() if module is head), None)


def left_alone(model: nn.Module, also: Iterable[str] = ()) -> set[str]:
    """Return paths of modules not to quantise or adapt: head, routers, gates, and layers whose weight is used directly.

    The source of the model's classes in transformers tells which those are. In a model that sees, what stands beside
    the language model is left alone, too, but for the parts named in `also` (language_model.py).
    """
    chosen = chosen_parts(model, also, packable(model)) if also else set()
    return _unfit(model) | (beside(model) - chosen)


def packable(model: nn.Module) -> set[str]:
    """Return paths of plain linear layers that compute alike when packed, wherever they stand."""
    unfit = _unfit(model)
    return {path for path, module in model.named_modules() if is_product(module) and path not in unfit}


def _unfit(model: nn.Module) -> set[str]:
    last_names = {HEAD, *_used_directly(frozenset(type(module).__module__ for module in model.modules()))}
    head = head_path(model)
    return {
        path
        for path, module in model.named_modules()
        if path == head or path.split(".")[-1] in last_names or _gives_more(type(module))
    } | gates(model)


def linears_to_quantise(model: nn.Module, also: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Return path -> layer for every plain linear layer that is not left alone (layer_kinds.py says what is plain)."""
    kept = left_alone(model, also)
    return {path: m for path, m in model.named_modules() if is_product(m) and path not in kept}


@lru_cache
def _gives_more(kind: type[nn.Module]) -> bool:
    """Tell whether `kind` is an nn.Linear whose own forward returns several things, as Llama 4's router does."""
    if not issubclass(kind, nn.Linear) or kind.forward is nn.Linear.forward:
        return False
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):  # no source: typed at a prompt, or compiled
        return False
    return re.search(r"return \w+, ", source) is not None


@lru_cache
def _used_directly(modules: frozenset[str]) -> frozenset[str]:
    """Return names of layers whose weight a family's own code multiplies or passes on, as in Mamba and RWKV."""
    theirs = (sys.modules[name] for name in modules if name.startswith("transformers.models."))
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in theirs]
    return frozenset(name for text in texts for name in DIRECT_USE.findall(text))


def quantize_linears(
    model: nn.Module,
    codebook: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    plan: Plan | str | Path | None = None,
) -> nn.Module:
    """Replace each plain linear layer of `model` by a Linear4bit, in place, except `left_alone`. Returns `model`.

    plan: a Plan or its file, instead of the options, for layers that differ (quant/plan.py).
    Stacks of experts stay as they are; `load` and quantize_folder quantise those, too.
    Raises what quantize raises, with the layer's name, and ValueError if there is nothing to replace, or for a plan of
    another model.
    """
    targets = linears_to_quantise(model)
    if not targets:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantise besides {HEAD}: leave it as it is")
    numel = {name: linear.weight.numel() for name, linear in targets.items()}
    options = of_layers(Candidate(codebook, block_size, double_quant), as_plan(plan), numel)
    for name, linear in targets.items():
        weight = quantize(as_matrix(linear, linear.weight), *options[name], name=f"{name}.weight")
        model.set_submodule(name, Linear4bit(weight, linear.bias, is_turned(linear)))
    return model
