"""save_pretrained of a model with adapters: it writes the adapter, as transformers does for adapters of PEFT.

So a checkpoint of transformers' Trainer holds what was trained. Other files of the folder stay, unlike in save_adapter.
adapter_checksum identifies an adapter on disk, for those who record what they measured.
"""

import hashlib
import weakref
from pathlib import Path

from torch import nn

from qlora_lab.files import disk
from qlora_lab.files.checksums import sha256
from qlora_lab.files.home import expanded
from qlora_lab.files.out_path import check_outside_model, out_folder


class AdapterSaver:
    """What a model with adapters calls as save_pretrained. Its reference is weak, as in model/parameter_count.py."""

    def __init__(self, model: nn.Module):
        self.model = weakref.ref(model)

    def __call__(self, save_directory: str | Path, is_main_process: bool = True, *_, **__) -> None:
        """Write the adapter's files into a folder that may hold others. Of transformers' options one is read.

        Raises ValueError for the model's own folder, or one inside it.
        """
        from qlora_lab.adapters.peft_format import CONFIG, save_adapter  # which imports the adapters

        if not is_main_process:  # of several, under accelerate
            return
        folder = out_folder(save_directory)
        check_outside_model(folder / CONFIG, getattr(self.model(), "name_or_path", None))
        disk.make_folder(folder)
        with disk.scratch(folder, ".adapter-") as home:
            made = save_adapter(self.model(), home / "adapter")
            # Without its configuration nothing is an adapter: a kill leaves none, and never a mixture of two.
            disk.remove(folder / CONFIG)
            for path in sorted(made.iterdir(), key=lambda path: path.name == CONFIG):  # that one last
                disk.rename(path, folder / path.name)

    def __reduce__(self) -> tuple:
        return AdapterSaver, (self.model(),)  # a copy of the model saves its own adapter


def adapter_checksum(folder: str | Path) -> str:
    """Return a checksum of an adapter's settings and tensors. Raises FileNotFoundError for a folder without one.

    A name does not identify an adapter: a second training writes into a folder of the same name.
    """
    from qlora_lab.adapters.peft_format import CONFIG, WEIGHTS  # which imports this file

    folder = expanded(folder)
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {name}: name a folder that holds an adapter in PEFT's format")
        digest.update(bytes.fromhex(sha256(path)))  # a checksum of checksums, as model_record's
    return digest.hexdigest()
