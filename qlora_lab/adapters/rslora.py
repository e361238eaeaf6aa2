"""rsLoRA: LoRA scaled by alpha / sqrt(r), so that a higher rank learns no slower.

    y = base(x) + (alpha / sqrt(r)) x A^T B^T

The gradients of A and B then neither vanish nor explode with r; under alpha / r they shrink by 1 / sqrt(r).
Source: Kalajdzievski (arXiv 2312.03732), theorem 3.2.
"""

import math
from typing import ClassVar

from qlora_lab.adapters.lora_linear import LoRALinear


class RsLoRALinear(LoRALinear):
    method = "rslora"
    flags: ClassVar[dict[str, bool]] = {"use_rslora": True}

    @staticmethod
    def divisor(r: int) -> float:
        return math.sqrt(r)
