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
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.quantize import QuantizedTensor

FAMILIES = ("llama", "mistral", "qwen2")  # model_type of their configurations
STATIC = ("default", "linear", "llama3", "yarn")  # rotary embeddings that are the same at every length
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


def read_stack(model: nn.Module) -> Stack:
    """Return the weights of `model`. Raises UnlikeLlama, a ValueError, for a model that step.py would get wrong."""
    config = getattr(model, "config", None)
    _check_config(model, config)
    body, head = model.model, model.get_output_embeddings()
    if hooked := next((path for path, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks), None):
        raise UnlikeLlama(f"{hooked or 'the model'} has a hook, which only its own forward calls")
    layers = tuple(_layer(layer, f"layers.{i}") for i, layer in enumerate(body.layers))
    _check_adapters(model, [product for layer in layers for product in layer.products])
    width = config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads
    return Stack(
        body.embed_tokens.weight.detach(),
        layers,
        body.norm.weight.detach(),
        _product(head, "the head"),
        config.num_attention_heads,
        config.num_key_value_heads,
        width,
        config.rms_norm_eps,
        _rotary_of(body.rotary_emb),
    )


def _check_config(model: nn.Module, config) -> None:
    family = getattr(config, "model_type", None)
    name = type(model).__name__
    if family not in FAMILIES or not name.endswith("ForCausalLM") or not hasattr(model, "model"):
        raise UnlikeLlama(f"{name} is not of {', '.join(FAMILIES)}")
    if config.hidden_act != "silu":
        raise UnlikeLlama(f"its gate is {config.hidden_act}, not silu")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    # Qwen2's configuration names a window that its layers do not use; their types tell.
    if kinds or (not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)):
        raise UnlikeLlama("its attention sees a window of the text only")
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type", "default") not in STATIC:
        raise UnlikeLlama(f"its rotary embedding, {rotary['rope_type']}, changes with the length of the text")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise UnlikeLlama("it is not on the CPU")


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
    plain = isinstance(module, nn.Linear) and type(module.weight.data) is torch.Tensor
    if not plain and not (isinstance(module, Linear4bit) and not module.turned):
        raise UnlikeLlama(f"{path} is a {type(module).__name__}")
    weight = module.weight if isinstance(module, Linear4bit) else module.weight.detach()
    return Product(weight, None if module.bias is None else module.bias.detach(), lora)


def _check_adapters(model: nn.Module, products: list[Product]) -> None:
    """Raise UnlikeLlama for an adapter that stands elsewhere than beside one of the products."""
    there = [module for module in model.modules() if isinstance(module, Adapter)]
    if len(there) > sum(product.lora is not None for product in products):
        raise UnlikeLlama(f"its adapter is a {type(there[0]).__name__}, not LoRA beside a linear layer")


def _rotary_of(module: nn.Module) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """The model's own angles, whatever its scaling: transformers computes them."""

    def rotary(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            cos, sin = module(torch.empty(0, dtype=torch.float32), torch.arange(n)[None])  # (1, n, head_dim)
        return cos[0].contiguous(), sin[0].contiguous()

    return rotary
