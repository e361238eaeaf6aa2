"""What each layer of a model is quantised as: data type, block size and double quantization, kept in a JSON file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from qlora_lab.files.home import expanded
from qlora_lab.files.out_path import out_replacing
from qlora_lab.files.replace import replace_text
from qlora_lab.files.strict_json import NUMBER, OBJECT, SWITCH, TEXT, check_keys, each, read_json, whole
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import codebook as named_codebook

REMEDY = "make a plan for this model"


class Candidate(NamedTuple):
    """One way to quantise a layer: the options of quantize."""

    codebook: str
    block_size: int
    double_quant: bool


DEFAULT = Candidate("nf4", 64, True)  # the paper's choice, and the default of load and quantize_folder


@dataclass(frozen=True)
class Plan:
    """One candidate for each linear layer of `model`, and for each of its stacks of experts, or for none of these.

    error: the sum of the chosen errors. bits_per_parameter: of the quantised layers, with their constants.
    numel: weights of each layer or stack; they tell whether a plan fits a model.
    """

    model: str
    chosen: dict[str, Candidate]
    error: float
    bits_per_parameter: float
    numel: dict[str, int]

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON and return its path; a plan that is already there is replaced whole, or not at all.

        Raises as check_plan_path does. Waits while another process writes a plan there.
        """
        path = check_plan_path(path)
        layers = {name: choice._asdict() | {"numel": self.numel[name]} for name, choice in self.chosen.items()}
        lines = [f"  {json.dumps(name)}: {json.dumps(layer)}" for name, layer in layers.items()]  # one line per layer
        head = {"model": self.model, "error": self.error, "bits_per_parameter": self.bits_per_parameter}
        body = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items())
        replace_text(path, f'{{\n{body},\n "layers": {{\n' + ",\n".join(lines) + "\n }\n}\n")
        return path

    def check(self, numel: dict[str, int]) -> None:
        """Raise ValueError at the first difference between this plan and a model. numel: layer -> its weights."""
        for name, weights in numel.items():
            if name not in self.chosen:
                raise ValueError(f"the plan for {self.model} lacks {name}, which the model has: {REMEDY}")
            if self.numel[name] != weights:
                sizes = f"{self.numel[name]:,} weights, but the model's layer has {weights:,}"
                raise ValueError(f"the plan for {self.model} gives {name} {sizes}: {REMEDY}")
        for name in self.chosen:
            if name not in numel:
                what = "neither a linear layer nor experts of this model"
                raise ValueError(f"the plan for {self.model} names {name}, {what}: {REMEDY}")


def of_layers(options: Candidate, plan: Plan | None, numel: dict[str, int]) -> dict[str, Candidate]:
    """Return the options of each layer: those of `plan`, or the same `options` for all without one.

    numel: layer -> its weights. Raises ValueError for another model's plan, and for a plan beside other options.
    """
    if plan is None:
        return dict.fromkeys(numel, options)
    if options != DEFAULT:
        raise ValueError(f"a plan decides codebook, block size and double quantization: leave out {tuple(options)}")
    plan.check(numel)
    return plan.chosen


def as_plan(plan: Plan | str | Path | None) -> Plan | None:
    """Return the plan, after reading it if `plan` is a path."""
    return plan if plan is None or isinstance(plan, Plan) else load_plan(plan)


def check_plan_path(path: str | Path) -> Path:
    """Return the path if a plan may be written there.

    Raises FileExistsError for a path that holds anything but a plan, FileNotFoundError for a folder that is not there,
    and ValueError for an empty path.
    """
    return out_replacing(path, "a plan", load_plan)


def load_plan(path: str | Path) -> Plan:
    """Read a plan. Raises ValueError, with the reason, for a file that does not hold one."""
    path = expanded(path)
    try:
        content = read_json(path, _PLAN_RULES, _PLAN_RULES)
        layers = content["layers"]
        for name, layer in layers.items():
            check_keys(layer, _LAYER_RULES, name, _LAYER_RULES)
    except ValueError as error:
        reason = str(error).removeprefix(str(path)).lstrip(", ")
        raise ValueError(f"{path} is not a plan, or is cut off ({reason})") from None
    chosen = {name: Candidate(*(layer[key] for key in Candidate._fields)) for name, layer in layers.items()}
    for name, candidate in chosen.items():
        if unknown := sorted(layers[name].keys() - _LAYER_RULES.keys()):
            raise ValueError(f"{path}: {name} has an unknown entry {unknown[0]!r}: {REMEDY}")
        try:
            check_candidate(candidate)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    numel = {name: layer["numel"] for name, layer in layers.items()}
    return Plan(content["model"], chosen, float(content["error"]), float(content["bits_per_parameter"]), numel)


_PLAN_RULES = {"model": TEXT, "error": NUMBER, "bits_per_parameter": NUMBER, "layers": each(OBJECT)}
_LAYER_RULES = {"codebook": TEXT, "block_size": whole(1), "double_quant": SWITCH, "numel": whole(1)}


def check_candidate(candidate: Candidate) -> None:
    """Raise what quantize raises for these options, and TypeError for a double_quant that is not a bool."""
    named_codebook(candidate.codebook)
    check_block_size(candidate.block_size)
    if not isinstance(candidate.double_quant, bool):  # "no" would count as true
        raise TypeError(f"double_quant={candidate.double_quant!r} must be True or False")
