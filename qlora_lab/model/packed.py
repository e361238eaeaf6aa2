"""Find the tensors of a folder in 4 bits, each with the stored pieces that make it, to be read one at a time.

In: a folder by quantized_folder.py or bitsandbytes. Out: name in the model -> Packed, whose `read` gives a
QuantizedTensor for a packed weight, and a plain tensor for any other. On the CPU both are views of the mapped files.

Not here: originals (stored.py), and the keys of a packed weight (quant/serialize.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from qlora_lab.model.experts import layout_of, stacks_of
from qlora_lab.model.layer_kinds import is_turned
from qlora_lab.model.linear4bit import head_path, packable
from qlora_lab.model.model_files import ModelError
from qlora_lab.model.stored import Stored, check_shape, files_of, opened_once, stored_tensors
from qlora_lab.quant.quantize import Quantized, dequantize
from qlora_lab.quant.serialize import from_tensors
from qlora_lab.quant.stack import STATE, stack_from_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Packed:
    """A tensor of the model in the pieces that its folder stores."""

    stored: Stored
    files: dict[str, Path]  # key of a piece -> its file
    stays: bool  # packed; else it is decoded at once
    turned: bool = False  # a Conv1D's, or such a stack: packed as its transpose

    def read(self) -> torch.Tensor | Quantized:
        """Read the tensor; its files are opened anew, so dropping it frees their pages."""
        with opened_once(self.files) as files:
            return self.take(files)

    def take(self, files: Mapping[Path, safe_open]) -> torch.Tensor | Quantized:
        """Read the tensor from open files. Raises ModelError, naming the file, for pieces that make no tensor."""
        if self.stored.rule:
            return self.stored.read()
        key = next(iter(self.stored.files))
        pieces = {piece: files[file].get_tensor(piece) for piece, file in self.files.items()}
        try:
            tensor = pieces[key] if len(pieces) == 1 else _reader(pieces, key)(pieces, key)
        except (KeyError, ValueError) as error:
            raise ModelError(f"{self.stored.file}: {error.args[0]}") from None
        if not isinstance(tensor, Quantized):
            return self.stored.checked(tensor)
        # Only the stored shape tells a matrix from its transpose: both have as many codes.
        *outer, rows, columns = self.stored.shape
        shape = (*outer, columns, rows) if self.turned else (*outer, rows, columns)
        check_shape(self.stored.file, self.stored.name, tensor.shape, torch.Size(shape))
        # bitsandbytes also packs layers whose weight the family's code uses directly: these are decoded here.
        if self.stays:
            return tensor
        return dequantize(tensor, torch.float32).t() if self.turned else dequantize(tensor, torch.float32)


def _reader(pieces: Mapping[str, torch.Tensor], key: str) -> Callable[[Mapping[str, torch.Tensor], str], Quantized]:
    return stack_from_tensors if f"{key}.{STATE}" in pieces else from_tensors


def packed_tensors(model: "PreTrainedModel", folder: Path) -> dict[str, Packed]:
    """Return name in the model -> its tensor. Raises ModelError, as stored_tensors does."""
    files = files_of(folder)  # key -> file
    parts: dict[str, list[str]] = {}  # name in the model -> stored keys: a packed weight has several
    # bitsandbytes names pieces KEY.absmax, KEY.quant_map and so on.
    # Parts of a stack have its key and one more word; a sibling parameter, such as a bias, has another key.
    stacks = {key.removesuffix(f".{STATE}") for key in files if key.endswith(f".{STATE}")}
    for key in files:
        name, dot, _ = key.partition(".weight.")
        owner = key.rpartition(".")[0]
        parts.setdefault(f"{name}.weight" if dot else owner if owner in stacks else key, []).append(key)
    if not any(len(keys) > 1 for keys in parts.values()):
        raise ModelError(f"{folder} is quantised by its config.json, but not its tensors: mend one of the two")
    tensors = stored_tensors(model, folder, {name: files[keys[0]] for name, keys in parts.items()})
    can_stay = {*packable(model), head_path(model), *stacks_of(model)}
    turned = {path for path, module in model.named_modules() if is_turned(module)}
    turned |= {path for path in stacks_of(model) if layout_of(model.get_submodule(path.rpartition(".")[0])).turned}
    return {name: _packed(stored, parts, files, can_stay, turned) for name, stored in tensors.items()}


def _packed(stored: Stored, parts: dict[str, list[str]], files: dict[str, Path], can_stay: set, turned: set) -> Packed:
    keys = [piece for key in stored.files for piece in parts[key]]
    layer = stored.name.removesuffix(".weight")
    return Packed(stored, {key: files[key] for key in keys}, layer in can_stay, layer in turned)
