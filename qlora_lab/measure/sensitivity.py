"""How much does an error in a weight of each layer cost the model? What quant/block_size.py needs to share out bits.

In: a model that is not quantised, and a text to calibrate on. Out: s, (in_features,) float32 for each linear layer, so
that quantising W to Q is expected to do the damage of the sum over i, j of s_j (w_ij - q_ij)^2; then Choices.

With plain moments, s_j is the mean of x_j^2 over the tokens, x the layer's input: the damage is the squared error of
the layer's output if errors of weights are independent (the diagonal of the Hessian of GPTQ, arXiv 2210.17323). It
orders the candidates of one layer, but says nothing of what one layer's output is worth beside another's.
With fisher, s_j is half the mean over the rows i of the sum over tokens of (g_i x_j)^2, for each predicted token: g is
the gradient of the loss at the layer's output, by labels that the model itself draws. That is the diagonal of the
Fisher information, averaged over rows, so the damage is an expected increase of the loss in nats a token, and adds up
over layers.

Not here: the choice itself (quant/block_size.py), perplexity (perplexity.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from qlora_lab.finetune.data import to_device
from qlora_lab.finetune.fetch import resolve
from qlora_lab.finetune.linear4bit import is_quantisable
from qlora_lab.finetune.models import (
    check_names,
    empty_model,
    expected_shapes,
    files_of,
    is_linear_weight,
    may_lack,
    public_name,
    read_tensor,
    stored_options,
)
from qlora_lab.finetune.modes import mode
from qlora_lab.measure.perplexity import text_windows
from qlora_lab.quant.block_size import Candidate, Choices, check_candidate, stored_bits
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
) -> dict[str, torch.Tensor]:
    """Path of each linear layer -> s, (in_features,) float32 on the CPU: see the module docstring.

    text: its first `windows` windows of `length` tokens are the calibration; or batches with input_ids, and then
    tokenizer, windows and length are not used. fisher: one backward pass more, in float32 at best. seed: of the labels.
    Calibrate on other text than the one that the result is judged by. Changes no weight, gradient or training flag.
    Raises ValueError for a text that is too short, and for a model without plain linear layers.
    """
    if isinstance(text, str):
        batches = [{"input_ids": row[None]} for row in text_windows(tokenizer, text, length, windows)]
    else:
        batches = text
    layers = {name: module for name, module in model.named_modules() if is_quantisable(name, module)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no plain nn.Linear: load it with codebook=None to calibrate")
    sums = {name: torch.zeros(module.in_features, dtype=torch.float64) for name, module in layers.items()}
    draws = torch.Generator().manual_seed(seed)
    tokens = 0
    with mode(model, training=False), _watched(model, layers, sums, fisher) as embedded:
        for batch in tqdm(batches, "sensitivity", unit="batch", leave=False):
            ids = batch["input_ids"]
            tokens += ids.numel() if not fisher else ids[:, 1:].numel()
            batch = to_device({key: value for key, value in batch.items() if key != "labels"}, model)
            with torch.set_grad_enabled(fisher):
                logits = model(**batch, use_cache=False).logits
                if fisher:
                    torch.autograd.grad(_drawn_loss(logits, draws), embedded.pop())  # what counts is what hooks see
    if not tokens:
        raise ValueError("no batches: calibration needs at least one")
    return {name: (total / tokens).float() for name, total in sums.items()}


def choices_of(
    model: "PreTrainedModel | str | Path",
    candidates: Sequence[Candidate],
    sensitivity: dict[str, torch.Tensor],
    *,
    progress: bool = True,
) -> Choices:
    """Error and bits of each linear layer as each candidate: sum over i, j of s_j (w_ij - q_ij)^2.

    model: whatever load takes, and is then read tensor by tensor; or a model in memory that is not quantised.
    Raises ValueError for no candidates, or a layer whose sensitivity is missing or of another width, and what quantize
    and load raise.
    """
    candidates = tuple(Candidate(*one) for one in candidates)
    if not candidates:
        raise ValueError("no candidates: give at least one (codebook, block size, double quantization)")
    for one in candidates:
        check_candidate(one)
    name, count, weights = _weights(model)
    layers, numel, error = [], [], []
    for layer, weight in tqdm(weights, "candidates", total=count, unit="layer", disable=not progress, leave=False):
        s = _sensitivity_of(layer, weight, sensitivity)
        layers.append(layer)
        numel.append(weight.numel())
        error.append([_damage(weight, s, one, layer) for one in candidates])
    bits = [[stored_bits(n, one) for one in candidates] for n in numel]
    return Choices(tuple(layers), tuple(numel), candidates, np.array(error), np.array(bits, dtype=float), name)


def _damage(weight: torch.Tensor, s: torch.Tensor, candidate: Candidate, layer: str) -> float:
    q = quantize(weight, *candidate, name=f"{layer}.weight")
    squares = dequantize(q, torch.float32).sub_(weight).square_()  # (out_features, in_features)
    return float(squares.sum(0).double() @ s)  # every row has the same s


def _sensitivity_of(layer: str, weight: torch.Tensor, sensitivity: dict[str, torch.Tensor]) -> torch.Tensor:
    if layer not in sensitivity:
        raise ValueError(f"the sensitivity of {layer} is missing: calibrate on this model")
    s = sensitivity[layer]
    if s.shape != weight.shape[1:]:
        raise ValueError(
            f"the sensitivity of {layer} has shape {tuple(s.shape)}, but {weight.shape[1]} inputs: not its own"
        )
    return s.double().to(weight.device)


def _weights(model: "PreTrainedModel | str | Path") -> tuple[str, int, Iterator[tuple[str, torch.Tensor]]]:
    """(the model's name, how many layers, their paths and weights)."""
    if isinstance(model, nn.Module):
        linears = [
            (name, module.weight.detach()) for name, module in model.named_modules() if is_quantisable(name, module)
        ]
        if not linears:
            raise ValueError(f"{type(model).__name__} has no plain nn.Linear: load it with codebook=None")
        return model.name_or_path or type(model).__name__, len(linears), iter(linears)
    folder = resolve(model)
    if stored := stored_options(folder):
        raise ValueError(f"{folder} is in 4 bits already, as {stored}: choose for its original")
    empty = empty_model(folder, torch.float32)
    files, shapes = files_of(folder), expected_shapes(empty)
    check_names(folder, set(files), set(shapes), may_lack(empty))
    names = [name for name in shapes if name in files and is_linear_weight(empty, name)]  # in the model's order
    read = ((name.removesuffix(".weight"), read_tensor(files[name], name, shapes[name])) for name in names)
    return public_name(model), len(names), read


@contextmanager
def _watched(
    model: nn.Module, layers: dict[str, nn.Linear], sums: dict[str, torch.Tensor], fisher: bool
) -> Iterator[list[torch.Tensor]]:
    """Add to `sums`, for each token that passes: x_j^2; or, in backward, half the mean over i of (g_i x_j)^2.

    Yields the list of embedded inputs, where backward ends: so no weight gets a gradient, and frozen ones let it pass.
    """
    embedded = []

    def add(name: str, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        squares = x.detach().flatten(0, -2).double().square_()  # (tokens, in_features)
        sums[name] += (squares.sum(0) if weights is None else weights @ squares).cpu()

    def keep(name: str, module: nn.Linear, inputs: tuple, output: torch.Tensor) -> None:
        if not fisher:
            add(name, inputs[0])
            return
        x = inputs[0]
        output.register_hook(lambda g: add(name, x, g.flatten(0, -2).double().square_().mean(1) / 2))

    def begin(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in layers.items()]
    if fisher:
        hooks.append(model.get_input_embeddings().register_forward_hook(begin))
    try:
        yield embedded
    finally:
        for hook in hooks:
            hook.remove()


def _drawn_loss(logits: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Summed cross entropy of the next token, each drawn from what the model predicts."""
    flat = logits[:, :-1].flatten(0, 1).float()  # (tokens, vocabulary)
    labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=draws)[:, 0]
    return nn.functional.cross_entropy(flat, labels.to(flat.device), reduction="sum")
