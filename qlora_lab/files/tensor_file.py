"""Write a safetensors file, not yet synced (disk.py); if the disk refuses, the error is an OSError."""

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust names an errno


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        if not (match := SYSTEM_ERROR.search(str(error))):
            raise  # not the disk's: our own mistake
        number = int(match[1])  # 28: no space left
        raise OSError(number, os.strerror(number), str(path)) from error
