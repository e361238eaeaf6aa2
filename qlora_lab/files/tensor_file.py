"""Write a safetensors file; if the disk refuses, the error is an OSError.

In: tensors by name. Out: a file, not yet on the disk (files/disk.py, sync).
Not here: reading one (stored.py, checkpoint.py), a name for what is whole (replace.py).
"""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust names an errno


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError for a disk that refuses, where safetensors has an error of its own."""
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if not (match := SYSTEM_ERROR.search(str(error))):
            raise  # not the disk's: our own mistake
        number = int(match[1])  # 28: no space left
        raise OSError(number, os.strerror(number), str(path)) from error
