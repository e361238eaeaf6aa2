"""A module around packed weights: other libraries count and move them, casts leave them alone, state_dict names them.

In: a QuantizedTensor, or a QuantizedStack. linear4bit.py and experts4bit.py compute with it.
Packed weights are no Parameters, so no optimizer ever sees them. Their tensors are buffers that state_dict leaves out;
it holds them under the names that files have.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from qlora_lab.quant.double_quant import DoubleQuantized
from qlora_lab.quant.quantize import WEIGHT_DTYPES, Quantized
from qlora_lab.quant.serialize import from_tensors, to_tensors
from qlora_lab.quant.stack import QuantizedStack, stack_from_tensors, stack_to_tensors


def packed_tensors_of(weight: Quantized, key: str) -> dict[str, torch.Tensor]:
    """Return the tensors of packed weights as files have them. They share memory with `weight`."""
    # A linear layer's names are bitsandbytes', a stack's are ours alone.
    return stack_to_tensors(weight, key) if isinstance(weight, QuantizedStack) else to_tensors(weight, key)


class PackedModule(nn.Module):
    """Holds `weight`, packed and frozen, under the key that `key` gives for state_dict."""

    def __init__(self, weight: Quantized):
        super().__init__()
        self.weight = weight

    @property
    def weight(self) -> Quantized:
        weight = self._weight
        # One comparison a use: other libraries put tensors into _buffers without telling the module.
        return weight if self._buffers["packed"] is weight.packed else self._with_buffers(weight)

    @weight.setter
    def weight(self, weight: Quantized) -> None:
        self._weight = weight
        self._buffers.clear()  # double quantization has other buffers than plain constants
        for name, tensor in _buffers_of(weight).items():
            self.register_buffer(name, tensor, persistent=False)

    def _with_buffers(self, weight: Quantized) -> Quantized:
        """Return, and keep, `weight` with the buffers as its tensors: accelerate and torch.export replace them."""
        packed, *constants = (self._buffers[name] for name in _buffers_of(weight))
        constants = DoubleQuantized(*constants) if weight.double_quant else constants[0]
        levels = weight.levels.to(packed.device)
        self._weight = replace(weight, packed=packed, constants=constants, levels=levels)
        return self._weight

    @staticmethod
    def key(prefix: str) -> str:
        """Return the key of the weight; prefix: the module's path and a dot."""
        return f"{prefix}weight"

    def taken(self, x: torch.Tensor) -> torch.Tensor:
        """Return (..., in_features) as the product takes it. Raises TypeError for its dtype, ValueError for its width.

        The kernels read as many numbers as the weight has columns, so a narrower input would give garbage.
        """
        if x.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"input is {x.dtype}: cast it to float32, bfloat16 or float16")
        if x.shape[-1] != (in_features := self.weight.shape[-1]):
            raise ValueError(f"input has shape {tuple(x.shape)}, but its last dimension must be {in_features}")
        # Autocast knows torch's own products, and not ours.
        return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

    def extra_repr(self) -> str:
        return repr(self.weight)

    def _apply(self, fn, recurse: bool = True):
        probe = fn(torch.empty(0, dtype=torch.uint8, device=self.weight.device))  # .to(dtype) leaves integers alone
        if probe.device != self.weight.device:
            self.weight = self.weight.to(probe.device)
        buffers = self._buffers
        self._buffers = {}  # they have been moved, and are never cast
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers = buffers

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # a bias, if there is one
        destination.update(packed_tensors_of(self.weight, self.key(prefix)))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(self.take(state_dict, self.key(prefix), *rest), prefix, *rest)

    def take(self, state_dict: Mapping[str, torch.Tensor], key: str, *rest) -> dict[str, torch.Tensor]:
        """Load the weight called `key`, and return the tensors that are not its parts. rest: as torch passes it."""
        _, strict, missing_keys, _, error_msgs = rest
        ours = [k for k in state_dict if k == key or k.startswith(key + ".")]
        if ours:
            self._load_weight(state_dict, key, error_msgs)
        elif strict:  # PEFT loads its adapters with strict=False, and without the base
            missing_keys.append(key)
        return {k: v for k, v in state_dict.items() if k not in ours}

    def _load_weight(self, state_dict: Mapping[str, torch.Tensor], key: str, error_msgs: list[str]) -> None:
        # The kind of weight is the module's: a file of a matrix never becomes a stack.
        read = stack_from_tensors if isinstance(self.weight, QuantizedStack) else from_tensors
        try:
            weight = read(state_dict, key)
            if weight.shape != self.weight.shape:
                raise ValueError(f"{key} has shape {tuple(weight.shape)}, but the layer has {tuple(self.weight.shape)}")
            self.weight = weight.to(self.weight.device)  # where the layer is, wherever the file was loaded
        except (KeyError, ValueError) as error:
            error_msgs.append(str(error.args[0]))


def _buffers_of(weight: Quantized) -> dict[str, torch.Tensor]:
    return {"packed": weight.packed} | (vars(weight.constants) if weight.double_quant else {"absmax": weight.constants})
