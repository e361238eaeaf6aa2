"""What the server of tests/warm.py loads before it forks, in the server alone: nothing else imports this file.

transformers finds most of its modules late, so the ones that `load`, `finetune` and PEFT ask for are named.
"""

import os

import numba  # noqa: F401
import peft  # noqa: F401
import scipy.stats  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import qlora_lab.cli
import qlora_lab.train.trainer  # noqa: F401
import tests.warm  # noqa: F401
from qlora_lab import kernels


def _as_if_started() -> None:
    """A fork has no kernels, as its parent's threads are gone. This parent has none, and so they are there."""
    kernels._forked = False


os.register_at_fork(after_in_child=_as_if_started)  # called after the one of qlora_lab.kernels
