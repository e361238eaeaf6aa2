"""PiSSA: LoRA that starts as the largest part of the weight, and so learns where the weight acts most.

    W = U S V^T;   s B0 A0 = U_r S_r V_r^T,   s = alpha / r;   y = base(x) + s x (B A - B0 A0)^T

The paper takes s B0 A0 out of the base and adds s B A: the same function and the same gradients. Here the base keeps
its bits, and what was taken out is subtracted beside it, as the product of rank 2 r that files hold:

    B A - B0 A0 = (B - B0) A + B0 (A - A0),   which is exactly 0 at first

So the adapter is plain LoRA of rank 2 r on the original base, in PEFT too, which converts PiSSA to the same.
Source: Meng et al. (arXiv 2404.02948), section 3; their fast decomposition: Halko et al. (arXiv 0909.4061).

But: over a 4-bit base the paper quantises what is left of W, which loses less than quantising W. That base is a model
of its own, and no adapter file would fit the original.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from tqdm.auto import tqdm

from qlora_lab.adapters.lora import make, strengths_of
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.adapters.strength import check_alpha
from qlora_lab.model.linear4bit import decoded

EXTRA = 16  # directions beyond r, and rounds: the authors' fast decomposition takes 4 to 16 rounds
ROUNDS = 4


class PissaLinear(LoRALinear):
    method = "pissa"

    def __init__(self, base: nn.Module, *strength):
        super().__init__(base, *strength)
        self.begin()

    def begin(self) -> None:
        """Let A and B, as they are, be A0 and B0."""
        self.register_buffer("first_A", self.lora_A.detach().clone(), persistent=False)  # (r, in)
        self.register_buffer("first_B", self.lora_B.detach().clone(), persistent=False)  # (out, r)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.cat([self.lora_A, self.lora_A - self.first_A])  # (2 r, in)
        B = torch.cat([self.lora_B - self.first_B, self.first_B], dim=1)  # (out, 2 r)
        return A, B

    def plain(self) -> LoRALinear:
        layer = LoRALinear(self.base, 2 * self.r, 2 * self.alpha, self.dropout.p, torch.Generator())
        layer.lora_A.data, layer.lora_B.data = (factor.detach() for factor in self.factors())
        return layer


@torch.no_grad()
def start(layer: LoRALinear, weight: torch.Tensor, generator: torch.Generator) -> None:
    """Let scaling B A of `layer` be the best product of rank r for `weight`, (out_features, in_features) float32.

    A weight with fewer than r rows or columns leaves the other rows of A, and columns of B, as they are.
    """
    k = min(layer.r + EXTRA, *weight.shape)
    probe = torch.randn(weight.shape[1], k, dtype=torch.float32, generator=generator)  # (in, k)
    q = torch.linalg.qr(weight @ probe.to(weight.device)).Q  # (out, k): where the weight's largest part lies
    for _ in range(ROUNDS):
        q = torch.linalg.qr(weight @ (weight.t() @ q)).Q
    U, S, Vh = torch.linalg.svd(q.t() @ weight, full_matrices=False)  # (k, k), (k,), (k, in)
    r = min(layer.r, len(S))
    root = (S[:r] / layer.scaling).sqrt()  # half of each singular value to either side
    layer.lora_A[:r] = root[:, None] * Vh[:r]
    layer.lora_B[:, :r] = q @ U[:, :r] * root


def pissa(
    model: nn.Module,
    r: int | Mapping[str, int] = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str | Iterable[str] = "all-linear",
    *,
    progress: bool = True,
) -> dict[str, PissaLinear]:
    """Make what add_lora makes, with A and B from the weights. Arguments and errors as there."""
    check_alpha("twice alpha, which the file of pissa holds,", 2 * alpha)
    strengths = strengths_of(model, r, alpha, targets)
    made = make(PissaLinear, model, strengths, dropout)
    generator = torch.Generator().manual_seed(0)  # for the decomposition
    for layer in tqdm(made.values(), "decomposing", disable=not progress, delay=2, unit="layer"):
        start(layer, decoded(layer.base), generator)
        layer.begin()
    return made
