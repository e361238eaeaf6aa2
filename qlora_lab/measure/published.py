"""Figures that others have published, as data with their source: read from the repository's folder data/published.

Not here: anything measured by this library.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

DATA = Path(__file__).parents[2] / "data" / "published"


def published_nf4() -> torch.Tensor:
    """The 16 NF4 levels as bitsandbytes ships them: (16,) float32, ascending.

    Raises FileNotFoundError where the library was installed without the repository around it.

    >>> published_nf4()[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    return torch.tensor(read_data("nf4.json")["levels"])


def published_af4() -> torch.Tensor:
    """The 16 levels of AbnormalFloat for blocks of 64 as bitsandbytes lists them: (16,) float32, ascending.

    Raises as published_nf4 does.
    """
    return torch.tensor(read_data("af4.json")["levels"])


@dataclass(frozen=True)
class PublishedDataType:
    """One published figure of a data type, as printed. codebook: its name here, None for weights of 16 bits.

    erratum: what is wrong with it, or with what is concluded from it; empty where nothing was found.
    """

    data_type: str
    codebook: str | None
    double_quant: bool
    metric: str
    value: str
    source: str
    erratum: str = ""


def published_data_types() -> tuple[PublishedDataType, ...]:
    """What the QLoRA paper measured of data types: mean perplexity (table 2) and MMLU (table 4).

    Raises FileNotFoundError where the library was installed without the repository around it.

    >>> published_data_types()[0].value
    '34.34'
    """
    return tuple(PublishedDataType(**figure) for figure in read_data("data_types.json")["figures"])


def read_data(name: str) -> dict:
    """A file of data/published. Raises FileNotFoundError where the library was installed without the repository."""
    path = DATA / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not here: published figures come with a clone of the repository, not with pip"
        )
    return json.loads(path.read_text(encoding="utf-8"))
