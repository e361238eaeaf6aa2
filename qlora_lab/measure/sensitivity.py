"""Estimate what an error in each layer's weights costs the model, so that bits can go where they matter.

In: an unquantised model, and a text to calibrate on. Out: s, (in_features,) float32 for each linear layer: quantising W
to Q is expected to do a damage of the sum over i, j of s_j (w_ij - q_ij)^2. A stack of experts has one s for each,
(experts, in_features); the tokens that are routed elsewhere count as zeros. Then Choices, for best_plan.

Without fisher, s_j is the mean of x_j^2 over the tokens, where x is the layer's input. The damage is then the squared
error of the layer's output, if errors of weights are independent (the diagonal of the Hessian in GPTQ, arXiv
2210.17323). It ranks the candidates of one layer, but cannot weigh one layer's output against another's.
With fisher, s_j is half the mean, over the rows i, of the diagonal of the Fisher information per predicted token: the
squared gradient of the loss at w_ij, with labels drawn from the model itself. The loss is first summed over a window:
the labels of two tokens are drawn independently, so the products of their gradients vanish on average. The damage is
then an expected increase of the loss in nats per token, and adds up over layers.

But: a window's gradient is a sum over tokens of g_i x_j, where g is the gradient at the layer's output, and these terms
are correlated. Summing their squares takes as long and predicts a cost of 0.223 nats for NF4 in blocks of 64 on
SmolLM2-135M; the s of this file predicts 0.270; the cost is 0.275 (bench/block_size.py).

Not here: the choice itself (best_plan.py), perplexity (perplexity.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from qlora_lab.adapters.expert_lora import LoRAStack
from qlora_lab.data.dataset import to_device
from qlora_lab.measure.best_plan import Choices, unmeasured
from qlora_lab.measure.perplexity import check_windows_fit, text_windows
from qlora_lab.model.empty_model import empty_model, stored_options
from qlora_lab.model.experts import DOWN, stacks_of
from qlora_lab.model.fetch import resolve
from qlora_lab.model.layer_kinds import turned
from qlora_lab.model.load import public_name
from qlora_lab.model.loaded import check_model, check_pair
from qlora_lab.model.modes import mode
from qlora_lab.model.one_by_one import one_by_one
from qlora_lab.model.quantised import shapes_to_quantise
from qlora_lab.model.stored import stored_tensors
from qlora_lab.quant.numbers import check_seed
from qlora_lab.quant.plan import Candidate, check_candidate
from qlora_lab.quant.quantize import dequantize, quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer

Batches = Sequence[dict[str, torch.Tensor]]


def sensitivity(
    model: "PreTrainedModel",
    tokenizer: "Tokenizer | None",
    text: str | Batches,
    *,
    windows: int = 8,
    length: int = 512,
    fisher: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Return path of each linear layer and stack of experts -> s, float32 on the CPU: see the module docstring.

    text: its first `windows` windows of `length` tokens calibrate; or batches with input_ids, one window per row, and
    attention_mask if rows are padded (tokenizer, windows and length are unused then). fisher: adds a backward pass,
    best in float32. seed: of the labels.
    Calibrate on a text that does not judge the result. Changes no weight, gradient or training flag.
    Raises ValueError for a text that is too short, and for a model without plain linear layers or with adapters beside
    experts; FloatingPointError for one that predicts NaN.
    """
    if isinstance(text, str):
        check_pair(model, tokenizer)
    else:
        check_model(model)  # batches need no tokenizer
    batches = calibration(model, tokenizer, text, windows, length)
    return calibrated(model, batches, fisher, seed, progress).means


class Calibrated(NamedTuple):
    """What a calibration has seen."""

    means: dict[str, torch.Tensor]  # path -> s
    routed: dict[str, torch.Tensor]  # path of a module of experts -> (experts,) int64: tokens that went to each
    tokens: int  # that were read


def calibration(
    model: "PreTrainedModel", tokenizer: "Tokenizer | None", text: str | Batches, windows: int, length: int
) -> Batches:
    """Return the batches that `text` stands for: see sensitivity."""
    if not isinstance(text, str):
        return text
    rows = text_windows(tokenizer, text, length, windows)  # (windows, length)
    check_windows_fit(model, tokenizer, rows)
    return [{"input_ids": row[None]} for row in rows]


def calibrated(model: "PreTrainedModel", batches: Batches, fisher: bool, seed: int, progress: bool) -> Calibrated:
    """Do what sensitivity does, and count the tokens that each expert gets."""
    check_seed(seed)
    check_experts_are_bare(model)
    shapes = shapes_to_quantise(model)
    sums = {path: torch.zeros(*shape[:-2], shape[-1], dtype=torch.float64) for path, shape in shapes.items()}
    stacks = stacks_of(model)
    routed = {path.rpartition(".")[0]: torch.zeros(len(stack), dtype=torch.int64) for path, stack in stacks.items()}
    draws = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws the same labels
    tokens = read = 0
    bar = tqdm(batches, "sensitivity", unit="batch", disable=not progress, leave=False)
    with mode(model, training=False), _watched(model, sums, routed, fisher) as embedded, torch.set_grad_enabled(fisher):
        for rows in (rows for batch in bar for rows in _without_padding(batch)):
            counted = rows["input_ids"][:, 1:] if fisher else rows["input_ids"]  # nothing predicts the first token
            if not counted.numel():
                continue
            tokens += counted.numel()
            read += rows["input_ids"].numel()
            logits = model(**to_device(rows, model), use_cache=False).logits
            if fisher:
                torch.autograd.grad(_drawn_loss(logits, draws), embedded.pop())  # only for the hooks on its way
    if not tokens:
        raise ValueError("no batches with a token to predict: give at least one to calibrate on")
    return Calibrated({name: (total / tokens).float() for name, total in sums.items()}, routed, read)


def check_experts_are_bare(model: nn.Module) -> None:
    """Raise ValueError for adapters beside stacks of experts, which then lie where no search for stacks finds them."""
    if any(isinstance(module, LoRAStack) for module in model.modules()):
        raise ValueError(f"experts of this {type(model).__name__} have adapters: remove the adapters first")


def _without_padding(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batch; or, if a mask hides some of it, its rows one by one without their padded tokens."""
    batch = {key: value for key, value in batch.items() if key != "labels"}
    mask = batch.get("attention_mask")
    if mask is None or mask.all():
        yield batch
        return
    for i, real in enumerate(mask.bool()):
        yield {key: value[i : i + 1, real] for key, value in batch.items()}  # (1, tokens)


def choices_of(
    model: "PreTrainedModel | str | Path",
    candidates: Sequence[Candidate],
    sensitivity: dict[str, torch.Tensor],
    *,
    progress: bool = True,
) -> Choices:
    """Compute the error (the sum over i, j of s_j (w_ij - q_ij)^2) and the bits of each layer as each candidate.

    model: anything that load takes, to be read tensor by tensor; or an unquantised model in memory.
    Raises ValueError without candidates, and for a layer whose sensitivity is missing or has another width; and
    whatever quantize and load raise.
    """
    candidates = tuple(Candidate(*candidate) for candidate in candidates)
    if not candidates:
        raise ValueError("no candidates: give at least one (codebook, block size, double quantization)")
    for candidate in candidates:
        check_candidate(candidate)
    name, count, weights = _weights(model)  # weights are read one by one
    shapes: dict[str, torch.Size] = {}
    error: list[list[float]] = []  # (layers, candidates)
    for layer, weight in tqdm(weights, "candidates", total=count, unit="layer", disable=not progress, leave=False):
        s = _sensitivity_of(layer, weight, sensitivity)
        shapes[layer] = weight.shape
        error.append([sum(damages(weight, s, candidate, layer)) for candidate in candidates])
    return replace(unmeasured(shapes, candidates), error=np.array(error), model=name)


def damages(weight: torch.Tensor, s: torch.Tensor, candidate: Candidate, layer: str) -> list[float]:
    """Return the damage of each expert in a stack, (experts, out_features, in_features), or of the one matrix."""
    names = [f"{layer}[{i}]" for i in range(len(weight))]
    if weight.dim() == 2:
        names, weight, s = [f"{layer}.weight"], weight[None], s[None]
    found = []
    for name, matrix, sensitive in zip(names, weight, s, strict=True):
        q = quantize(matrix, *candidate, name=name)
        squares = dequantize(q, torch.float32).sub_(matrix).square_()  # (out_features, in_features)
        found.append(float(squares.sum(0).double() @ sensitive))  # all rows share s
    return found


def _sensitivity_of(layer: str, weight: torch.Tensor, sensitivity: dict[str, torch.Tensor]) -> torch.Tensor:
    if layer not in sensitivity:
        raise ValueError(f"the sensitivity of {layer} is missing: calibrate on this model")
    s = sensitivity[layer]
    if s.shape != weight.shape[:-2] + weight.shape[-1:]:
        shape = f"shape {tuple(s.shape)}, but {weight.shape[-1]} inputs"
        raise ValueError(f"the sensitivity of {layer} has {shape}: calibrate on this model")
    return s.double().to(weight.device)


def _weights(model: "PreTrainedModel | str | Path") -> tuple[str, int, Iterator[tuple[str, torch.Tensor]]]:
    """Return the model's name, the number of its layers and stacks, and an iterator of their paths and weights."""
    if isinstance(model, nn.Module):
        check_experts_are_bare(model)
        names = _names(model, shapes_to_quantise(model))
        read = ((path, turned(model, name, model.get_parameter(name).detach())) for path, name in names.items())
        return model.name_or_path or type(model).__name__, len(names), read
    folder = resolve(model)
    if stored := stored_options(folder):
        raise ValueError(f"{folder} is in 4 bits already, as {stored}: give the original")
    empty = empty_model(folder, torch.float32)
    stored = stored_tensors(empty, folder)
    names = _names(empty, shapes_to_quantise(empty))
    read = ((path, turned(empty, name, stored[name].read())) for path, name in names.items())
    return public_name(model), len(names), read


def _names(model: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, str]:
    """Return path -> name of the parameter: a stack is one itself."""
    return {path: path if len(shape) == 3 else f"{path}.weight" for path, shape in shapes.items()}


@contextmanager
def _watched(
    model: nn.Module, sums: dict[str, torch.Tensor], routed: dict[str, torch.Tensor], fisher: bool
) -> Iterator[list[torch.Tensor]]:
    """Add x_j^2 of each passing token to `sums`; with fisher, half the mean over i of each window's (dW_ij)^2.

    routed: counts the tokens of each expert.
    Yields the list of embedded inputs, at which the backward pass ends: no weight gets a gradient, and the gradient
    flows through frozen weights, too.
    """
    embedded = []  # at most one: each backward pass takes it out

    def keep(total: torch.Tensor, module: nn.Module | None, inputs: tuple, output: torch.Tensor) -> None:
        x = inputs[0].detach()  # (rows, tokens, in_features), or (tokens, in_features) of an expert
        if fisher:
            output.register_hook(lambda g: add_squares(total, x, g))
        else:
            total += x.flatten(0, -2).double().square().sum(0).cpu()

    def keep_of_expert(path: str, name: str, expert: int, x: torch.Tensor, output: torch.Tensor) -> None:
        keep(sums[f"{path}.{name}"][expert], None, (x,), output)
        routed[path][expert] += len(x) * (name == DOWN)  # once for both matrices

    def add_squares(total: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> None:
        for x_row, g_row in zip(_windows(x), _windows(g), strict=True):
            gradient = g_row.float().t() @ x_row.float()  # (out, tokens) @ (tokens, in) -> (out_features, in_features)
            # -> (in_features,). In float32: a sum in float64 would take four times as long as the product.
            total += gradient.square_().mean(0).double().cpu() / 2

    def begin(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())  # (rows, tokens, hidden), a new leaf of the graph
        return embedded[-1]

    linears = [path for path in sums if path.rpartition(".")[0] not in routed]
    hooks = [model.get_submodule(path).register_forward_hook(partial(keep, sums[path])) for path in linears]
    if fisher:
        hooks.append(model.get_input_embeddings().register_forward_hook(begin))
    try:
        with one_by_one(model, keep_of_expert):
            yield embedded
    finally:
        for hook in hooks:
            hook.remove()


def _windows(x: torch.Tensor) -> torch.Tensor:
    """View x as (windows, tokens, features); a layer that sees a flat list of tokens gets one window."""
    return x.reshape(-1, *x.shape[-2:])


def _drawn_loss(logits: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Sum the cross entropy of next tokens that are drawn from the model's own predictions."""
    flat = logits[:, :-1].flatten(0, 1).float()  # (tokens, vocabulary); nothing follows the last token
    if not flat.isfinite().all():
        raise FloatingPointError("the model predicts NaN or infinity: look for them in its weights, or use float32")
    labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=draws)[:, 0]  # (tokens,)
    return nn.functional.cross_entropy(flat, labels.to(flat.device), reduction="sum")
