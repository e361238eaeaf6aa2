"""Adapters that PEFT puts beside parameters, not layers: stacks of experts, and weights whose names it misreads.

In: tensors by the key of a layer, PATH.lora_A.weight, as peft_format.py keeps them. Out: those of a file, and back.

                 here                          in a file, for n experts
    lora_A       (n, r, in_features)           (n r, in_features): expert by expert
    lora_B       (n, out_features, r)          (out_features, r n): column i n + e is column i of expert e
    keys         EXPERTS.gate_up_proj.lora_A   EXPERTS.base_layer.lora_A; without an adapter of down_proj EXPERTS.lora_A
                 EXPERTS.down_proj.lora_A      EXPERTS.lora_A

A file's keys do not name the parameter: PEFT wraps a module once for each parameter that it adapts, in the order in
which the module has them. target_parameters in the configuration says which they are.
Source: PEFT 0.21, ParamWrapper in tuners/lora/layer.py, _inject_parameters in tuners/tuners_utils.py, and
utils/transformers_weight_conversion.py for the names that it takes for those of experts.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from qlora_lab.adapters.layer_patterns import uncompiled
from qlora_lab.model.experts import DOWN, experts_of, layout_of

SETTING = "target_parameters"
PAIR = ("lora_A", "lora_B")
INNER = "base_layer."  # where PEFT's first wrapper lies once there is a second
# What PEFT takes for names of experts, wherever they stand, by transformers' name for how a family's files keep them.
MISREAD = {"mixtral": ("gate", "w1", "w2", "w3"), "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj")}


def misread(model: nn.Module, path: str) -> bool:
    """Tell whether PEFT takes the name of the linear layer at `path` for one of experts, as in DeepSeek's first layer.

    Such a layer's weight is named as a parameter: its tensors are the same. But PEFT then refuses dropout.
    """
    from transformers import conversion_mapping  # the model is of transformers, so it is loaded

    # PEFT asks this very table. Mixtral is not in it; of its layers none has such a name.
    table = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    kind = table.get(getattr(getattr(model, "config", None), "model_type", None))
    return path.split(".")[-1] in MISREAD.get(kind, ())


def warn_of_dropout(model: nn.Module, paths: Iterable[str], dropout: float) -> None:
    """Warn of dropout beside a layer that is misread: it trains and loads here, and PEFT alone refuses it."""
    if dropout and (path := next((path for path in paths if misread(model, path)), None)):
        warnings.warn(
            f"PEFT will not read an adapter with dropout={dropout} beside {path}, whose name it takes for one of "
            "experts: set dropout=0 if PEFT is to read it",
            stacklevel=6,  # the caller of add_lora or add_adapter
        )


def is_named(config: Mapping, parameter: str) -> bool:
    """Tell whether target_parameters names this parameter: whole, or by the end of its path."""
    named = config.get(SETTING) or ()
    return any(parameter == name or parameter.endswith(f".{name}") for name in named)


def parameter_names(model: nn.Module, parameters: list[str]) -> list[str]:
    """Return target_parameters: the last two parts of paths if they match exactly these parameters, else paths."""
    short = sorted({".".join(path.split(".")[-2:]) for path in parameters})
    stacks = (f"{path}.{name}" for path, m in experts_of(model).items() for name in (layout_of(m).up, DOWN))
    weights = (f"{path}.weight" for path, module in model.named_modules() if hasattr(module, "weight"))
    meant = {uncompiled(path) for path in (*stacks, *weights) if is_named({SETTING: short}, path)}
    return short if meant <= set(parameters) else parameters


def in_files(
    model: nn.Module, tensors: dict[str, torch.Tensor], plain: Callable[[str], str]
) -> dict[str, torch.Tensor]:
    """Return `tensors` as a file has them. plain: makes the prefix of a file's keys from a path."""
    tensors = dict(tensors)
    for path, experts in experts_of(model).items():
        layout = layout_of(experts)
        adapted = [name for name in (layout.up, DOWN) if f"{plain(path)}.{name}.lora_A.weight" in tensors]
        for name in adapted:
            A, B = (tensors.pop(f"{plain(path)}.{name}.{part}.weight") for part in PAIR)
            if _swaps(experts):
                A, B = B.transpose(1, 2), A.transpose(1, 2)
            inner = INNER * (name != adapted[-1])
            tensors[f"{plain(path)}.{inner}lora_A.weight"] = A.reshape(-1, A.shape[-1])  # (n r, in)
            tensors[f"{plain(path)}.{inner}lora_B.weight"] = B.permute(1, 2, 0).reshape(B.shape[1], -1)  # (out, r n)
    return tensors


def by_layer(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    config: Mapping,
    plain: Callable[[str], str],
    where: str,
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file as they are kept here.

    Raises ValueError for experts with keys of other parameters than the configuration names, or a shape that no rank
    gives.
    """
    tensors = dict(tensors)
    for path, experts in experts_of(model).items():
        keys = [f"{plain(path)}.{inner}{part}.weight" for inner in (INNER, "") for part in PAIR]
        if tensors.keys().isdisjoint(keys):
            continue
        names = (layout_of(experts).up, DOWN)
        named = [name for name in names if is_named(config, f"{uncompiled(path)}.{name}")]
        needed = keys[-2 * len(named) :] if named else []
        if {key for key in keys if key in tensors} != set(needed):
            raise ValueError(
                f"{where} has other tensors for {path} than {SETTING} in its configuration names, which is "
                f"{', '.join(named) or 'none'} there: save it again with PEFT"
            )
        for name, a, b in zip(named, needed[::2], needed[1::2], strict=True):
            A, B = _of_experts(tensors.pop(a), tensors.pop(b), experts, f"{where} does not fit: {path}.{name}")
            tensors |= {f"{plain(path)}.{name}.lora_A.weight": A, f"{plain(path)}.{name}.lora_B.weight": B}
    return tensors


def _of_experts(A: torch.Tensor, B: torch.Tensor, experts: nn.Module, what: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(n r, in), (out, r n) -> (n, r, in), (n, out, r)."""
    n = experts.num_experts
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or A.shape[0] % n or not A.shape[0]:
        shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
        raise ValueError(
            f"{what} has {shapes}, but {n} experts need (rank times {n}, inputs) and (outputs, rank times {n}): load "
            "the model that the adapter was trained on"
        )
    A = A.reshape(n, -1, A.shape[-1])
    B = B.reshape(len(B), -1, n).permute(2, 0, 1)
    return (B.transpose(1, 2), A.transpose(1, 2)) if _swaps(experts) else (A, B)


def _swaps(experts: nn.Module) -> bool:
    """Tell whether PEFT takes inputs for outputs: Llama 4's stacks lie turned, and no attribute of theirs says so."""
    # Its product is the same matrix, transposed, so A and B change places.
    return layout_of(experts).turned != bool(getattr(experts, "is_transposed", False))
