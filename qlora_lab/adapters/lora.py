"""Put LoRA, or a relative of it, beside layers of a model and beside its stacks of experts.

In: a model, and names of layers with a rank for each. Out: the same model, in which only the adapters learn.
Source: LoRA (arXiv 2106.09685) section 4; QLoRA section 4 for all linear layers as targets.
Not here: what an adapter computes (lora_linear.py, expert_lora.py); which layers (targets.py); files (peft_format.py).
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import nn

from qlora_lab.adapters.adapter import adapters, method_of, put_into
from qlora_lab.adapters.expert_lora import kind_beside
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.peft_parameters import warn_of_dropout
from qlora_lab.adapters.strength import check_strength
from qlora_lab.adapters.targets import adaptable, strengths_of
from qlora_lab.quant.numbers import check_seed, check_whole


def add_lora(
    model: nn.Module,
    r: int | Mapping[str, int] = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Iterable[str] = "all-linear",
    *,
    seed: int = 0,
) -> nn.Module:
    """Put an adapter beside layers of `model`, in place, and freeze everything else. Returns `model`.

    r: one rank, or a rank for each layer: patterns of the ends of their paths, of which the first that matches counts,
    as in PEFT's rank_pattern: {"q_proj": 4, r"layers\\.0\\..*": 32, ".*": 8}. alpha is the same for all.
    targets: "all-linear", which the QLoRA paper found necessary (every linear layer except the head, routers, gates,
    and layers whose weight the family's own code uses directly); "attention", its linear layers; "experts", a pair for
    each expert; "shared-experts", linear layers beside them, which all tokens pass; "all", linear layers and experts.
    Or names: last names ("q_proj"), whole paths, or ends of paths of experts ("experts.down_proj"). Or several.
    seed: for lora_A. Raises ValueError for a name that matches nothing, a model without a layer to adapt, an adapter
    that is already there, a rank, alpha or dropout that is not allowed, or dropout beside experts. Warns of dropout
    beside layers whose names PEFT takes for those of experts (docs/families.md): it refuses to read such an adapter.
    """
    return put_into(model, partial(maker_of(LoRALinear), model, r, alpha, dropout, targets, seed=seed))


def maker_of(kind: type[LoRALinear]) -> Callable[..., dict[str, LoRALinear]]:
    """Return what makes layers of `kind`; its arguments and errors are those of add_lora."""

    def made(
        model: nn.Module,
        r: int | Mapping[str, int] = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: str | Iterable[str] = "all-linear",
        *,
        seed: int = 0,
    ) -> dict[str, LoRALinear]:
        return make(kind, model, strengths_of(model, r, alpha, targets), dropout, seed=seed)

    return made


def adapt(
    model: nn.Module,
    strengths: dict[str, tuple[int, float]],
    dropout: float = 0.0,
    kind: type[LoRALinear] = LoRALinear,
    *,
    seed: int = 0,
) -> nn.Module:
    """Do what add_lora does, with an (r, alpha) for each layer. strengths: path of a layer or stack -> (r, alpha)."""
    return put_into(model, partial(make, kind, model, strengths, dropout, seed=seed))


def make(
    kind: type[LoRALinear],
    model: nn.Module,
    strengths: dict[str, tuple[int, float]],
    dropout: float = 0.0,
    *,
    seed: int = 0,
) -> dict[str, LoRALinear]:
    """Make layers of `kind` for layers and stacks of `model`. strengths: path of one -> (r, alpha)."""
    check_seed(seed)
    layers = adaptable(model)
    for r, alpha in strengths.values():  # all checks first: an error leaves the model as it was
        check_whole("r", r)
        check_strength(alpha, dropout)
    kinds = {path: kind_beside(layers[path], kind, dropout) for path in strengths}
    warn_of_dropout(model, strengths, dropout)
    generator = torch.Generator().manual_seed(seed)  # its own: torch's global draws stay as they are
    return {path: kinds[path](layers[path], *strength, dropout, generator) for path, strength in strengths.items()}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return path -> layer for the layers of `model` that LoRA or a relative adapts.

    Raises ValueError if there are none, or for adapters of another method.
    """
    layers = adapters(model)
    if not all(isinstance(layer, LoRALinear) for layer in layers.values()):
        raise ValueError(f"the adapters of this model are of method {method_of(model)}, but only LoRA can be used here")
    return layers
