"""Which layers a method adapts: by their names, and with a rank for each.

In: a model, and names or patterns as add_lora takes them. Out: paths, layers, or strengths by path.
Source: QLoRA section 4 and figure 2, which found that all linear layers must be adapted.
"""

from collections.abc import Iterable, Mapping
from reprlib import repr as short

from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.layer_patterns import first_match
from qlora_lab.model.experts4bit import stack_modules
from qlora_lab.model.language_model import beside
from qlora_lab.model.linear4bit import is_linear, left_alone

# A name for several layers -> what a model lacks that has none of them.
GROUPS = {
    "all-linear": "linear layer besides its head",
    "attention": "linear layer in attention",
    "experts": "experts in one tensor",
    "shared-experts": "shared experts",
    "all": "layer besides its head",
}
# What a path has above the layer's own name. There is no other sign: a family may call its classes as it likes.
PARTS_OF_PATHS = {"attention": ("attn", "attention"), "shared-experts": ("shared_expert", "shared_mlp")}


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


def choose_targets(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Return paths of the linear layers and stacks of experts that `targets` names (see add_lora), in a fixed order."""
    wanted = {targets} if isinstance(targets, str) else set(targets)
    linears, stacks = list(linear_layers(model)), list(stacks_of_experts(model))
    found = {name: _group(model, name, linears, stacks) for name in wanted}
    unknown = sorted(name for name in wanted if name not in GROUPS and not found[name])
    if unknown or not wanted:
        outside = beside(model)
        inside = {path.split(".")[-1] for path in linears if path not in outside}
        names = sorted({".".join(path.split(".")[-2:]) for path in stacks} | inside)
        raise ValueError(
            f"targets {unknown or 'none'} match no linear layer: "
            f"choose {', '.join(map(repr, GROUPS))} or from {', '.join(names)}"
        )
    for name in sorted(wanted):
        if not found[name]:
            raise ValueError(
                f"{type(model).__name__} has no {GROUPS[name]}: choose a model with some, or other targets"
            )
    chosen = set().union(*found.values())
    return [path for path in (*linears, *stacks) if path in chosen]


def _group(model: nn.Module, name: str, linears: list[str], stacks: list[str]) -> list[str]:
    """Return the paths that one of GROUPS, or a name, means."""
    if name == "experts":
        return stacks
    if name in GROUPS:
        kept = left_alone(model)  # head, routers, weights used directly
        chosen = [path for path in linears if path not in kept]
        if name in PARTS_OF_PATHS:
            return [path for path in chosen if any(part in path.rpartition(".")[0] for part in PARTS_OF_PATHS[name])]
        return chosen + (stacks if name == "all" else [])
    # Linear layers first: DeepSeek has some of the names of its experts, and a name alone always meant those.
    # A tower has layers of the same names: q_proj alone means those of the language model.
    outside = beside(model)
    named = [path for path in linears if name == path or (name == path.split(".")[-1] and path not in outside)]
    return named or [path for path in stacks if path == name or path.endswith(f".{name}")]


def stacks_of_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> stack of experts; for an adapted one its base, under the adapter's path."""
    return {
        path: module.base if isinstance(module, Adapter) else module for path, module in stack_modules(model).items()
    }


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> what LoRA can stand beside: linear layers, and stacks of experts. For an adapted one its base."""
    return linear_layers(model) | stacks_of_experts(model)


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
