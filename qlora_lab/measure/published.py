"""Read figures that others have published, with their sources, and what the project has measured."""

import json
from dataclasses import dataclass

import torch

from qlora_lab.files.course import course_path


def published_nf4() -> torch.Tensor:
    """Return the 16 NF4 levels of bitsandbytes: (16,) float32, ascending."""
    return torch.tensor(read_data("nf4.json")["levels"])


def published_af4() -> torch.Tensor:
    """Return bitsandbytes' 16 levels of AbnormalFloat for blocks of 64. Shape and dtype as in published_nf4."""
    return torch.tensor(read_data("af4.json")["levels"])


@dataclass(frozen=True)
class PublishedDataType:
    """One published figure of a data type."""

    data_type: str
    codebook: str | None  # its name here; None for weights of 16 bits
    double_quant: bool
    metric: str
    value: str  # as printed
    source: str
    erratum: str = ""  # an error in the figure, or in a conclusion from it; empty if we found none


def published_data_types() -> tuple[PublishedDataType, ...]:
    """Return the QLoRA paper's figures of data types: mean perplexity (table 2) and MMLU (table 4)."""
    return tuple(PublishedDataType(**figure) for figure in read_data("data_types.json")["figures"])


def read_data(name: str) -> dict:
    """Read a file of data/published."""
    return json.loads(course_path("data", "published", name).read_text(encoding="utf-8"))


def read_bench(name: str) -> dict:
    """Read figures that a command of bench/ has measured and stored, such as "paging.json"."""
    return json.loads(course_path("bench", name).read_text(encoding="utf-8"))
