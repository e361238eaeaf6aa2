"""Which layers a method adapts: by their names, and with a rank for each.

In: a model, and names or patterns as add_lora takes them. Out: linear layers, or strengths, by path.
Source: QLoRA section 4 and figure 2, which found that all linear layers must be adapted.
"""

from collections.abc import Iterable, Mapping
from reprlib import repr as short

from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.layer_patterns import first_match
from qlora_lab.model.experts import DOWN, experts_of, layout_of
from qlora_lab.model.language_model import beside
from qlora_lab.model.linear4bit import is_linear, left_alone


def strengths_of(
    model: nn.Module, r: int | Mapping[str, int], alpha: float, targets: str | Iterable[str]
) -> dict[str, tuple[int, float]]:
    """Return path -> (r, alpha) for the layers that `targets` names (see add_lora)."""
    chosen = choose_targets(model, targets)
    if not isinstance(r, Mapping):
        return dict.fromkeys(chosen, (r, alpha))
    found = {path: first_match(r, path, "r") for path in chosen}  # path -> (its place, rank), or None
    if lacking := [path for path, match in found.items() if match is None]:
        raise ValueError(f"r has no rank for {lacking[0]}: name it, add '.*' for all others, or choose other targets")
    used = {match[0] for match in found.values()}
    if unused := [pattern for pattern in r if f"r[{short(pattern)}]" not in used]:
        raise ValueError(f"r[{short(unused[0])}] matches no layer that an earlier name leaves: mend or drop it")
    return {path: (rank, alpha) for path, (_, rank) in found.items()}


def choose_targets(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """Return path -> linear layer for those that `targets` names (see add_lora), in the model's order."""
    linears = linear_layers(model)
    # A tower has layers of the same names: q_proj alone means those of the language model.
    outside = beside(model)
    last_names = sorted({name.split(".")[-1] for name in linears if name not in outside})
    if targets == "all-linear":
        kept = left_alone(model)  # head, routers, weights used directly
        chosen = {name: m for name, m in linears.items() if name not in kept}
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no linear layer besides its head: choose a model with some")
        return chosen
    wanted = {targets} if isinstance(targets, str) else set(targets)
    unknown = wanted - set(linears) - set(last_names)
    if stack := next((name for name in sorted(unknown) if _names_a_stack(model, name)), None):
        raise ValueError(
            f"{stack} holds experts in one tensor, which no adapter is put beside here: "
            f"choose 'all-linear' or from {', '.join(last_names)}"
        )
    if unknown or not wanted:
        raise ValueError(
            f"targets {sorted(unknown) or 'none'} match no linear layer: "
            f"choose 'all-linear' or from {', '.join(last_names)}"
        )
    return {
        name: m
        for name, m in linears.items()
        if name in wanted or (name.split(".")[-1] in wanted and name not in outside)
    }


def _names_a_stack(model: nn.Module, name: str) -> bool:
    paths = {f"{path}.{stack}" for path, m in experts_of(model).items() for stack in (layout_of(m).up, DOWN)}
    return name in paths or name in {path.split(".")[-1] for path in paths}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> linear layer, in the model's order; for an adapted one its base, under the adapter's path."""
    layers: dict[str, nn.Module] = {}
    inside = ""  # of the last adapter: its base and what it learns
    for path, module in model.named_modules():
        if inside and path.startswith(inside):
            continue
        if isinstance(module, Adapter):
            inside = f"{path}."
            module = getattr(module, "base", None)
        if module is not None and is_linear(module):
            layers[path] = module
    return layers
