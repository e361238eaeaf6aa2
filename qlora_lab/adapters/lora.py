"""LoRA: a frozen linear layer plus a trainable product of two thin matrices.

    y = base(x) + scaling * dropout(x) A^T B^T,   scaling = alpha / r

In: x, (..., in_features). Out: y, (..., out_features). lora_A: (r, in_features), lora_B: (out_features, r), float32.
Source: LoRA (arXiv 2106.09685) section 4.1. A and B start as in PEFT and the authors' code: A uniform within
1/sqrt(in_features), B zero, so that the adapted model first equals the base exactly. (The paper says A is Gaussian.)

The adapter is stored in float32 whatever the model computes in: at lr 2e-4 an update is smaller than one unit in the
last place of a bf16 weight and would be lost. The two products run in the dtype of x. Beside a Linear4bit on the CPU
they run in float32 and are added before the layer's one rounding (kernels/product.py), unless there is dropout.

Not here: variants such as DoRA; files (peft_format.py, which reads rsLoRA as plain LoRA with alpha * sqrt(r)).
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from qlora_lab.model.linear4bit import Linear4bit, left_alone
from qlora_lab.quant.numbers import check_number, check_seed, check_whole


class LoRALinear(nn.Module):
    """`base`, an nn.Linear or Linear4bit, with an adapter of rank r beside it. The base is frozen.

    r: at least 1; above min(in_features, out_features) it costs memory and expresses nothing more.
    alpha: strength, above 0; the product is scaled by alpha / r.
    dropout: on the adapter's input in training, 0 to below 1. generator: draws lora_A.
    Raises ValueError outside these ranges.
    """

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
        bound = 1 / math.sqrt(base.in_features)
        A = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)  # on the CPU: one seed, one A
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))  # (out, r)

    def set_strength(self, alpha: float, dropout: float) -> None:
        """Set alpha, and thereby scaling = alpha / r, and dropout."""
        check_strength(alpha, dropout)
        self.alpha = alpha
        # B A is a sum of r terms: dividing by r keeps its size, so a learning rate found at one r serves at another.
        self.scaling = alpha / self.r
        self.dropout.p = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropping = self.training and self.dropout.p > 0  # base and adapter then read different x
        exact = self.lora_A.dtype == self.lora_B.dtype == torch.float32  # a caller can set .data
        if isinstance(self.base, Linear4bit) and self.base.takes_adapter and exact and not dropping:
            return self.base(x, (self.lora_A, self.lora_B, self.scaling))  # the same as below, in one pass over x
        A = self.lora_A.to(x.dtype)  # (r, in)
        B = self.lora_B.to(x.dtype)  # (out, r)
        low = self.dropout(x) @ A.t() * self.scaling  # (..., in) @ (in, r) -> (..., r): scaled where it is thinnest
        return self.base(x) + low @ B.t()  # (..., r) @ (r, out) -> (..., out)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}"

    def _apply(self, fn, recurse: bool = True):
        exact = [(p, p.data, None if p.grad is None else p.grad.data) for p in (self.lora_A, self.lora_B)]
        super()._apply(fn, recurse)  # may cast A and B
        for parameter, data, grad in exact:  # A and B move to another device, but stay float32 with the same bits
            if not data.is_meta:
                parameter.grad = None  # torch refuses new data of another dtype than the gradient's
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        return self


def add_lora(
    model: nn.Module,
    r: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Iterable[str] = "all-linear",
    *,
    seed: int = 0,
) -> nn.Module:
    """Put an adapter beside the linear layers of `model`, in place, and freeze everything else. Returns `model`.

    targets: "all-linear", which the QLoRA paper found necessary (every linear layer except the head, routers, and
    layers whose weight the family's own code uses directly), or layer names: last names ("q_proj") or whole paths.
    seed: for lora_A. Raises ValueError for a name that matches nothing, a model without a linear layer to adapt, an
    adapter that is already there, or a rank, alpha or dropout that is not allowed.
    """
    return adapt(model, dict.fromkeys(choose_targets(model, targets), (r, alpha)), dropout, seed=seed)


def adapt(
    model: nn.Module, strengths: dict[str, tuple[int, float]], dropout: float = 0.0, *, seed: int = 0
) -> nn.Module:
    """Do what add_lora does, with an (r, alpha) for each layer. strengths: path of a linear layer -> (r, alpha)."""
    if has_adapters(model):
        raise ValueError("this model has adapters already: load the model again")
    check_seed(seed)
    layers = linear_layers(model)
    for r, alpha in strengths.values():  # all checks first: an error leaves the model as it was
        check_whole("r", r)
        check_strength(alpha, dropout)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)  # its own: torch's global draws stay as they are
    for path, (r, alpha) in strengths.items():
        training = layers[path].training  # a new module would be in training mode
        model.set_submodule(path, LoRALinear(layers[path], r, alpha, dropout, generator).train(training))
    return model


def choose_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """Return path -> linear layer for those that `targets` names (see add_lora), in the model's order."""
    linears = linear_layers(model)
    last_names = sorted({name.split(".")[-1] for name in linears})
    if targets == "all-linear":
        kept = left_alone(model)  # head, routers, weights used directly
        chosen = {name: m for name, m in linears.items() if name not in kept}
        if not chosen:  # GPT-2's are Conv1D
            raise ValueError(f"{type(model).__name__} has no linear layer besides its head: choose a model with some")
        return chosen
    wanted = {targets} if isinstance(targets, str) else set(targets)
    unknown = wanted - set(linears) - set(last_names)
    if unknown or not wanted:
        raise ValueError(
            f"targets {sorted(unknown) or 'none'} match no linear layer: "
            f"choose 'all-linear' or from {', '.join(last_names)}"
        )
    return {name: m for name, m in linears.items() if name in wanted or name.split(".")[-1] in wanted}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> linear layer, in the model's order; for an adapted one its base, under the adapter's path."""
    layers: dict[str, nn.Module] = {}
    bases = set()
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            bases.add(module.base)  # named_modules comes to it next
            module = module.base
        elif module in bases:
            continue
        if isinstance(module, (nn.Linear, Linear4bit)):
            layers[path] = module
    return layers


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, LoRALinear) for module in model.modules())


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Return path -> layer for the adapted layers of `model`. Raises ValueError if there are none."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    if not layers:
        raise ValueError("this model has no adapter: call qlora_lab.add_lora(model) first")
    return layers


def check_strength(alpha: float, dropout: float) -> None:
    """Raise ValueError unless 0 < alpha <= 1,000,000 and 0 <= dropout < 1."""
    allowed = "a number above 0 and at most 1,000,000, usually r or 16"
    check_number("alpha", alpha, lambda alpha: 0 < alpha <= 1e6, allowed)
    check_number("dropout", dropout, lambda share: 0 <= share < 1, "a number from 0 to below 1, usually 0 to 0.1")
