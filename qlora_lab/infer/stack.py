"""Read a model of LLaMA's shape into a plain record of its weights, which step.py and fast.py compute with.

In: a model of transformers on the CPU, quantised or not, with LoRA or without. Out: a Stack; nothing is copied.
Source: LLaMA (arXiv 2302.13971) section 2.2.

A tree of modules does not tell what a family computes: Gemma's looks as LLaMA's does, and its norms add 1 to their
weights. So families are named here, each is compared with transformers by a test, and all others are refused.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.kernels import huge_pages
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.model.wide import WideHead
from qlora_lab.quant.quantize import QuantizedTensor

FAMILIES = ("llama", "mistral", "qwen2")  # model_type of their configurations
STATIC = ("default", "linear", "llama3", "yarn")  # rotary embeddings that are the same at every length
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that are not packed
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


class UnlikeLlama(ValueError):
    """A model that the decode path does not compute; the message says why."""


class Product(NamedTuple):
    """A linear layer: x W^T + bias + scaling (x A^T) B^T."""

    weight: QuantizedTensor | torch.Tensor  # (out_features, in_features)
    bias: torch.Tensor | None = None  # (out_features,)
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None  # A (r, in), B (out, r) and scaling
    int8: bool = False  # x W^T is computed with whole numbers (int8.py); what stands beside it is not


class Layer(NamedTuple):
    """A decoder layer."""

    attention_norm: torch.Tensor  # (hidden,)
    q: Product
    k: Product
    v: Product
    o: Product
    mlp_norm: torch.Tensor  # (hidden,)
    gate: Product
    up: Product
    down: Product

    @property
    def products(self) -> tuple[Product, ...]:
        """The seven in the order in which they are used."""
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down


class Stack(NamedTuple):
    """All that a token passes."""

    embedding: torch.Tensor  # (vocabulary, hidden)
    layers: tuple[Layer, ...]
    norm: torch.Tensor  # (hidden,)
    head: Product
    heads: int  # of queries
    kv_heads: int  # of keys and values: each is shared by heads / kv_heads queries
    head_dim: int
    eps: float  # of the norms
    rotary: Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # n -> cosines and sines of positions 0 to n - 1


def narrow_head(model: nn.Module) -> None:
    """Put embedding and head into bf16, in place, where that changes no number: a token reads all of the head.

    For a model that only answers. A token passes the layers in float32 whatever their dtype. Models that read_stack
    refuses stay as they are: transformers computes their answers, in the dtype that they have.
    """
    try:
        read_stack(model)
    except UnlikeLlama:
        return
    # a head that is its embedding is one parameter, and is put into bf16 once
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        wide = module.weight.data
        if wide.dtype != torch.float32:
            continue
        narrow = huge_pages.empty(wide.shape, torch.bfloat16).copy_(wide)
        if torch.equal(narrow.float(), wide):
            module.weight.data = narrow


def read_stack(model: nn.Module) -> Stack:
    """Return the weights of `model`. Raises UnlikeLlama, a ValueError, for a model that step.py would get wrong."""
    config = getattr(model, "config", None)
    _check_config(model, config)
    body, head = model.model, model.get_output_embeddings()
    _check_modules(model, body, config.model_type)
    layers = tuple(_layer(layer, f"layers.{i}") for i, layer in enumerate(body.layers))
    last = _product(head, "the head")
    _check_adapters(model, [*(product for layer in layers for product in layer.products), last])
    _check_sizes(body, layers)
    # the modules' own sizes: a configuration may be changed after they are made
    first, width = layers[0], body.layers[0].self_attn.head_dim
    return Stack(
        body.embed_tokens.weight.detach(),
        layers,
        body.norm.weight.detach(),
        last,
        first.q.weight.shape[0] // width,
        first.k.weight.shape[0] // width,
        width,
        body.norm.variance_epsilon,
        _rotary_of(body.rotary_emb),
    )


def _check_config(model: nn.Module, config) -> None:
    family = getattr(config, "model_type", None)
    name = type(model).__name__
    if family not in FAMILIES or not name.endswith("ForCausalLM") or not hasattr(model, "model"):
        raise UnlikeLlama(f"{name} is not of {', '.join(FAMILIES)}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    # Qwen2's configuration names a window that its layers do not use; their types tell.
    if kinds or (not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)):
        raise UnlikeLlama("its attention sees a window of the text only")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise UnlikeLlama("it is not on the CPU")


def _check_modules(model: nn.Module, body: nn.Module, family: str) -> None:
    """Raise UnlikeLlama where a module computes something other than its family's does."""
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise UnlikeLlama(f"{path or 'the model'} has a hook, which only its own forward calls")
        if "forward" in vars(module):  # put there by hand, or by a library that moves weights
            raise UnlikeLlama(f"{path or 'the model'} has a forward of its own")
    inner = [part for x in body.layers for part in (x, x.self_attn, x.mlp, *(getattr(x, name) for name in NORMS))]
    for module in (model, body, body.norm, body.rotary_emb, *inner):
        if type(module).__module__ != f"transformers.models.{family}.modeling_{family}":  # a subclass, for example
            raise UnlikeLlama(f"its {type(module).__name__} is not one of transformers' {family}")
    if body.rotary_emb.rope_type not in STATIC:
        raise UnlikeLlama(f"its rotary embedding, {body.rotary_emb.rope_type}, changes with the length of the text")
    if type(body.embed_tokens) is not nn.Embedding:
        raise UnlikeLlama(f"its embedding is a {type(body.embed_tokens).__name__}")
    gates = {type(layer.mlp.act_fn).__name__ for layer in body.layers} - {"SiLU", "SiLUActivation"}
    if gates:
        raise UnlikeLlama(f"its gate is {', '.join(sorted(gates))}, not SiLU")


def _check_sizes(body: nn.Module, layers: tuple[Layer, ...]) -> None:
    """Raise UnlikeLlama for layers that differ: one number stands for all, and the kernel's buffers have one size.

    Norms must share their eps, and attention must have the usual scale.
    """
    parts = [layer.self_attn for layer in body.layers]
    norms = [body.norm, *(getattr(layer, name) for layer in body.layers for name in NORMS)]
    shapes = {tuple(product.weight.shape for product in layer.products) for layer in layers}
    if len(shapes) > 1 or len({part.head_dim for part in parts}) > 1:
        raise UnlikeLlama("its layers differ in size")
    if len({norm.variance_epsilon for norm in norms}) > 1:
        raise UnlikeLlama("its norms differ in eps")
    if any(part.scaling != part.head_dim**-0.5 for part in parts):
        raise UnlikeLlama("its attention has a scale of its own")


def _layer(layer: nn.Module, path: str) -> Layer:
    parts = {**_parts(layer.self_attn, ATTENTION, path), **_parts(layer.mlp, MLP, path)}
    first, second = (getattr(layer, name).weight.detach() for name in NORMS)
    q, k, v, o, gate, up, down = (_product(part, f"{path}.{name}") for name, part in parts.items())
    return Layer(first, q, k, v, o, second, gate, up, down)


def _parts(module: nn.Module, names: tuple[str, ...], path: str) -> dict[str, nn.Module]:
    extra = {name for name, child in module.named_children() if name not in names and next(child.parameters(), None)}
    if extra:
        raise UnlikeLlama(f"{path} has {', '.join(sorted(extra))} as well")
    return {name: getattr(module, name) for name in names}


def _product(module: nn.Module, path: str) -> Product:
    lora = None
    if isinstance(module, LoRALinear) and type(module).forward is LoRALinear.forward:  # DoRA's does more
        A, B = (factor.detach() for factor in module.factors())
        lora = A, B, module.scaling
        module = module.base
    # no subclass and no other dtype: other libraries keep packed weights in those
    # a WideHead computes what is computed here: float32 logits, whatever the weight's dtype
    linear = type(module) in (nn.Linear, WideHead)
    plain = linear and type(module.weight.data) is torch.Tensor and module.weight.dtype in DTYPES
    if not plain and not (isinstance(module, Linear4bit) and not module.turned):
        what = f" of {module.weight.dtype}" if linear else ""
        raise UnlikeLlama(f"{path} is a {type(module).__name__}{what}")
    weight = module.weight if isinstance(module, Linear4bit) else module.weight.detach()
    return Product(weight, None if module.bias is None else module.bias.detach(), lora)


def _check_adapters(model: nn.Module, products: list[Product]) -> None:
    """Raise UnlikeLlama for an adapter that stands elsewhere than beside one of the products."""
    all_of_them = (module for module in model.modules() if isinstance(module, Adapter))
    there = [module for module in all_of_them if next(module.parameters(), None) is not None]  # not the mark of `full`
    if len(there) > sum(product.lora is not None for product in products):
        raise UnlikeLlama(f"its adapter is a {type(there[0]).__name__}, not LoRA beside a linear layer")


def _rotary_of(module: nn.Module) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """The model's own angles, whatever its scaling: transformers computes them."""

    def rotary(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            cos, sin = module(torch.empty(0, dtype=torch.float32), torch.arange(n)[None])  # (1, n, head_dim)
        return cos[0].contiguous(), sin[0].contiguous()

    return rotary
