"""LoRA: a frozen linear layer plus a trainable product of two thin matrices.

    y = base(x) + scaling * dropout(x) A^T B^T,   scaling = alpha / r

In: x, (..., in_features). Out: y, (..., out_features). lora_A: (r, in_features), lora_B: (out_features, r), float32.
Source: LoRA (arXiv 2106.09685) section 4.1. A and B start as in PEFT and the authors' code: A uniform within
1/sqrt(in_features), B zero, so that the adapted model first equals the base exactly. (The paper says A is Gaussian.)

The two products run in the dtype of x. Beside a Linear4bit on the CPU they run in float32 and are added before the
layer's one rounding (kernels/product.py), unless there is dropout.

Not here: experts (expert_lora.py); its relatives (rslora.py, dora.py, pissa.py, loftq.py, train/lora_plus.py); which
layers (targets.py); files (peft_format.py).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter, adapters, method_of, put_into
from qlora_lab.adapters.peft_parameters import warn_of_dropout
from qlora_lab.adapters.strength import check_strength
from qlora_lab.adapters.targets import adaptable, strengths_of
from qlora_lab.model.layer_kinds import out_and_in
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.numbers import check_seed, check_whole


class LoRALinear(Adapter):
    """`base`, an nn.Linear, Linear4bit or Conv1D, with an adapter of rank r beside it. The base is frozen.

    r: at least 1; above min(in_features, out_features) it costs memory and expresses nothing more.
    alpha: strength, above 0; the product is scaled by alpha / r.
    dropout: on the adapter's input in training, 0 to below 1. generator: draws lora_A.
    Raises ValueError outside these ranges.
    """

    method = "lora"
    flags: ClassVar[dict[str, bool]] = {}  # what PEFT's configuration says of a relative

    def __init__(
        self,
        base: nn.Module,
        r: int = 16,
        alpha: float = 16,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        check_whole("r", r)
        self.base = base.requires_grad_(False)
        self.r = r
        self.dropout = nn.Dropout()  # its p comes next
        self.set_strength(alpha, dropout)
        out_features, in_features = out_and_in(base)
        experts = base.weight.shape[:-2]  # () beside a linear layer
        bound = 1 / math.sqrt(in_features)
        # on the CPU: one seed, one A
        A = torch.empty(*experts, r, in_features).uniform_(-bound, bound, generator=generator)  # (r, in)
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(*experts, out_features, r, device=base.weight.device))  # (out, r)

    def set_strength(self, alpha: float, dropout: float) -> None:
        """Set alpha, and thereby scaling = alpha / r, and dropout."""
        check_strength(alpha, dropout)
        self.alpha = alpha
        self.scaling = alpha / self.divisor(self.r)
        self.dropout.p = dropout

    @staticmethod
    def divisor(r: int) -> float:
        # B A is a sum of r terms: dividing by r keeps its size, so a learning rate found at one r serves at another.
        return r

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A, (r, in_features), and B, (out_features, r), of the product beside the base."""
        return self.lora_A, self.lora_B

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        A, B = self.factors()  # lora_A and lora_B
        dropping = self.training and self.dropout.p > 0  # base and adapter then read different x
        exact = A.dtype == B.dtype == torch.float32  # a caller can set .data
        if isinstance(self.base, Linear4bit) and self.base.takes_adapter and exact and not dropping:
            return self.base(x, (A, B, self.scaling))  # the same as below, in one pass over x
        A = A.to(x.dtype)  # (r, in)
        B = B.to(x.dtype)  # (out, r)
        low = self.dropout(x) @ A.t() * self.scaling  # (..., in) @ (in, r) -> (..., r): scaled where it is thinnest
        return self.base(x) + low @ B.t()  # (..., r) @ (r, out) -> (..., out)

    def change(self, weight: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """Return what a merge adds to `weight`, these rows of the base's, (rows, in_features) float32 on any device."""
        A, B = self.factors()
        return (B[rows] @ A).mul_(self.scaling).to(weight.device)  # (rows, r) @ (r, in) -> (rows, in)

    def plain(self) -> "LoRALinear":
        """Return the layer of PEFT's kinds that computes the same, which files hold."""
        return self

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}"

    def settings(self) -> dict[str, float]:
        return {"r": self.r, "alpha": self.alpha, "dropout": self.dropout.p}


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
    from qlora_lab.adapters.expert_lora import kind_beside  # which imports this file

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
