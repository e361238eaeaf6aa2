"""Show which experts of a mixture a text uses, and what an error in each of them would cost.

    expert_use(model, tokenizer, text) -> ExpertUse for each layer and expert

In: an unquantised mixture, and a text. Out: tokens that each expert gets, and the expected increase of the loss if this
expert alone were quantised: the damage of sensitivity.py, with fisher, of its two matrices.
An expert that no token is routed to has no damage here, and another text may need it.

But: an error in an early layer also sends tokens of later layers to other experts, which no gradient tells, so the
change of an early expert is too low. A test compares those of a last layer with what is measured.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_lab.measure.sensitivity import Batches, calibrated, calibration, check_experts_are_bare, damages
from qlora_lab.model.experts import stacks_of
from qlora_lab.model.layer_kinds import turned
from qlora_lab.quant.plan import DEFAULT, Candidate, check_candidate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class ExpertUse:
    """One expert of one layer."""

    layer: str  # path of the module of experts
    expert: int
    tokens: int  # that are routed to it
    share: float  # of the tokens that were read; in each layer shares add up to k
    change: float  # expected, of the loss, in nats per token


def expert_use(
    model: "PreTrainedModel",
    tokenizer: "Tokenizer | None",
    text: str | Batches,
    candidate: Candidate = DEFAULT,
    *,
    windows: int = 8,
    progress: bool = True,
) -> list[ExpertUse]:
    """Return a row for each layer and expert, in the model's order. candidate: how an expert would be quantised.

    text: `windows` windows of 512 tokens of it, or batches, as for `sensitivity`, whose errors are raised here too.
    Raises ValueError for a model without experts in one tensor, or with packed or adapted ones.
    """
    check_candidate(candidate)
    check_experts_are_bare(model)  # else it would seem to have none
    stacks = stacks_of(model)
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no stacks of experts: give a mixture, loaded with codebook=None")
    found = calibrated(model, calibration(model, tokenizer, text, windows, 512), True, 0, progress)
    changes = {layer: [0.0] * len(tokens) for layer, tokens in found.routed.items()}
    for path, stack in stacks.items():
        layer = path.rpartition(".")[0]
        matrices = turned(model, path, stack.detach())  # (experts, out_features, in_features)
        s = found.means[path].double().to(stack.device)
        of_matrix = damages(matrices, s, candidate, path)
        changes[layer] = [sum(pair) for pair in zip(changes[layer], of_matrix, strict=True)]
    return [
        ExpertUse(layer, expert, n, n / found.tokens, changes[layer][expert])
        for layer, tokens in found.routed.items()
        for expert, n in enumerate(tokens.tolist())
    ]
