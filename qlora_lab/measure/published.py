"""Read figures that others have published, with their sources, from the repository's folder data/published."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

DATA = Path(__file__).parents[2] / "data" / "published"


def published_nf4() -> torch.Tensor:
    """Return the 16 NF4 levels of bitsandbytes: (16,) float32, ascending. Raises what read_data raises."""
    return torch.tensor(read_data("nf4.json")["levels"])


def published_af4() -> torch.Tensor:
    """Return bitsandbytes' 16 levels of AbnormalFloat for blocks of 64. Shape and errors as in published_nf4."""
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
    """Read a file of data/published. Raises FileNotFoundError if the library was installed without its repository."""
    path = DATA / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: published figures come with a clone of the repository")
    return json.loads(path.read_text(encoding="utf-8"))
