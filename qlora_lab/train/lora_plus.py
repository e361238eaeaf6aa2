"""LoRA+: lora_B learns faster than lora_A.

    rate of B = ratio * rate of A

With one rate for both, wide models learn too little: B starts at zero, and its best rate grows with the width, while
A's falls. Everything else that learns, such as DoRA's magnitudes, has A's rate.
Source: Hayou et al. (arXiv 2402.12354), sections 4 and 5.
"""

from typing import Any

import torch

from qlora_lab.adapters.adapter import learned


def rate_groups(model: torch.nn.Module, ratio: float) -> list[dict[str, Any]]:
    """Return groups of the parameters that learn, for an optimizer; "times": by what their learning rate is multiplied.

    With a ratio of 1 it is one group, without it. Other methods than LoRA's have no lora_B (check_run.py refuses them).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if ratio == 1:
        return [{"params": trained}]
    fast = {id(p) for name, p in learned(model).items() if name.endswith(".lora_B")}
    slow = [p for p in trained if id(p) not in fast]
    return [{"params": slow, "times": 1}, {"params": [p for p in trained if id(p) in fast], "times": ratio}]


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let each group learn at its multiple of `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("times", 1)
