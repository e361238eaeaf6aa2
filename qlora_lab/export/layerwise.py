"""Run a model straight from its files: each layer is read when it computes, and dropped after it.

In: a model folder, or an empty model and a function that reads its tensors. Out: a model that computes in float32.
Memory: its largest layer in float32. So a model is compared on a machine that cannot hold it.

Not here: gradients, and generation of a long text, which would read every layer again for each token.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import gcd, lcm
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_lab.model.empty_model import compute_buffers, empty_model, stored_options
from qlora_lab.model.layer_kinds import turned
from qlora_lab.model.packed import Packed, packed_tensors
from qlora_lab.model.stored import Stored, stored_tensors
from qlora_lab.quant.packing import group_of
from qlora_lab.quant.quantize import Quantized, QuantizedTensor, dequantize
from qlora_lab.quant.stack import QuantizedStack, dequantize_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PANEL = 2**19  # weights: 2 MiB in float32, a core's second-level cache
Reader = Callable[[str], torch.Tensor | Quantized]  # name of a tensor -> the tensor


def layerwise(folder: Path) -> "PreTrainedModel":
    """Return the model of `folder`, in 16 or in 4 bits, as `streamed` does.

    Raises ModelError, as `load` does, for files that do not belong to config.json.
    """
    model = empty_model(folder, torch.float32)
    return streamed(model, reader(model, folder))


def reader(model: "PreTrainedModel", folder: Path) -> Reader:
    """Return what reads the tensors of an empty model from its folder, one by one, as they are stored.

    Weights of linear layers come as (out_features, in_features), also those of a Conv1D; stacks of experts likewise.
    """
    tensors = (packed_tensors if stored_options(folder) else stored_tensors)(model, folder)

    def read(name: str) -> torch.Tensor | Quantized:
        tensor = tensor_of(name, tensors, model).read()
        return turned(model, name, tensor) if torch.is_tensor(tensor) else tensor

    return read


def streamed(model: "PreTrainedModel", read: Reader) -> "PreTrainedModel":
    """Let an empty model compute in float32 on the CPU, in evaluation mode; a forward pass reads each tensor once."""
    compute_buffers(model, torch.device("cpu"))
    for name in model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
        path, _, leaf = name.rpartition(".")  # a saved buffer, such as a routing bias: a few kilobytes
        model.get_submodule(path)._buffers[leaf] = read(name).clone()
    for path, module, whole in _units(model):
        names = [f"{path}.{name}".strip(".") for name, _ in module.named_parameters(recurse=whole)]
        module.register_forward_pre_hook(partial(_fill, model, names, read))
        module.register_forward_hook(partial(_empty, model, names))
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(_stand_in)  # after _empty
    _stand_in(embedding)
    return model.requires_grad_(False).eval()


def in_another_order(model: "PreTrainedModel") -> "PreTrainedModel":
    """Let the linear layers of a streamed model add up their products backwards. What that changes is rounding."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_turn)  # after streamed's, which brings the weight
            module.register_forward_hook(_turn_back)
    return model


def _turn(module: nn.Linear, inputs: tuple) -> tuple:
    if inputs:  # a call by name stays as it is
        module.weight.data = module.weight.data.flip(-1)
    return tuple(tensor.flip(-1) for tensor in inputs)


def _turn_back(module: nn.Linear, inputs: tuple, _: torch.Tensor) -> None:
    if inputs:  # some families also use the weight without a call
        module.weight.data = module.weight.data.flip(-1)


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield (path, module, whole): the layers of each stack as a whole, and modules outside with their own tensors.

    A layer as a whole, because some families' layers use the weight of a module inside without calling it.
    """
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, nn.ModuleList):
            for number, layer in enumerate(module):
                inside |= set(layer.modules())
                yield f"{path}.{number}", layer, True
        elif next(module.parameters(recurse=False), None) is not None:
            yield path, module, False


def tensor_of(name: str, stored: Mapping[str, Stored | Packed], model: "PreTrainedModel") -> Stored | Packed:
    """Find a tensor that may be stored under the name of one that it is tied to."""
    tied = model.all_tied_weights_keys  # target -> source
    others = [tied.get(name), *(target for target, source in tied.items() if source in (name, tied.get(name)))]
    return next(stored[other] for other in (name, *others) if other in stored)


def _fill(model: nn.Module, names: list[str], read: Reader, *_) -> None:
    for name in names:
        _put(model, name, turned(model, name, as_float(read(name))))


def as_float(tensor: torch.Tensor | Quantized) -> torch.Tensor:
    """Return a tensor in float32, exactly."""
    if isinstance(tensor, QuantizedStack):
        return dequantize_stack(tensor, torch.float32)
    return dequantize(tensor, torch.float32) if isinstance(tensor, QuantizedTensor) else tensor.float()


def panels(weight: torch.Tensor | QuantizedTensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, their weights in float32) of a matrix, so few at a time that what is made of them stays in cache.

    The memory of a panel is used again for the next.
    """
    n_rows, columns = weight.shape
    unit = _aligned_rows(weight) if isinstance(weight, QuantizedTensor) else 1
    height = min(max(1, PANEL // (columns * unit)) * unit, n_rows)
    if isinstance(weight, QuantizedTensor):
        weight = replace(weight, constants=weight.absmax)  # once for all panels
    buffer = torch.empty(height, columns, dtype=torch.float32)
    for first in range(0, n_rows, height):
        rows = slice(first, min(first + height, n_rows))
        panel = buffer[: rows.stop - first]
        if isinstance(weight, QuantizedTensor):
            dequantize(_rows(weight, rows), out=panel)
        else:
            panel.copy_(weight[rows])
        yield rows, panel


def _aligned_rows(q: QuantizedTensor) -> int:
    """Return how many rows end where a block and a byte end."""
    unit = lcm(q.block_size, group_of(q.bits)[0])
    return unit // gcd(unit, q.shape[1])


def _rows(q: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Return some rows of a matrix, which begin where a block and a byte do. Its constants are not quantised."""
    columns = q.shape[1]
    start, stop = rows.start * columns, rows.stop * columns
    n_codes, n_bytes = group_of(q.bits)
    packed = q.packed[start // n_codes * n_bytes : -(-stop // n_codes) * n_bytes]
    constants = q.constants[start // q.block_size : -(-stop // q.block_size)]
    return replace(q, packed=packed, constants=constants, shape=torch.Size([rows.stop - rows.start, columns]))


def _empty(model: nn.Module, names: list[str], *_) -> None:
    for name in names:
        path, _, leaf = name.rpartition(".")
        _put(model, name, getattr(model.get_submodule(path), leaf).to("meta"))


def _stand_in(embedding: nn.Module, *_) -> None:
    """Put one NaN on the CPU in the place of the embeddings, in all their rows and columns."""
    # Llama 4 sends its ids to this weight's device before the hook brings it: on meta they would lose their values.
    # Rows that are used without the hook show as NaN in every answer.
    _put(embedding, "weight", torch.full((), torch.nan, dtype=torch.float32).expand(embedding.weight.shape))


def _put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
