"""Compare a merged model with the adapter model that it was made from: by what both answer, and by layer.

In: the logits of both for the same tokens, and the weight of each adapted layer before and after. Out: a Parity.
KL is the mean, over all positions, of sum p (log p - log q) in nats: p are the adapter model's probabilities, q those
of the merged one. 0 means the same answers. On text that the adapter model itself would write, the perplexity of the
merged model is higher by the factor exp(KL).

Not here: whether the fine-tuning was good (measure/).
"""

import json
import math
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch
from torch import nn

from qlora_lab.model.modes import measuring
from qlora_lab.train.limits import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# The merged model must be nearer to the adapter model than to its base, else the merge has erased the fine-tuning. KL
# grows with the square of a small distance, so half way back is a quarter of what the adapter changed. Never more than
# 0.05 nats, 5 % more perplexity. 0.001 is allowed to a merge that has not erased the adapter: nobody sees 0.1 %, and
# rounding to bf16 costs SmolLM2-135M 0.0001.
HALF_WAY = 1 / 4
MOST_KL = 0.05
LEAST_KL = 0.001
LEAST_ARRIVED = 1 / 2  # of a change, in the weights
MOST_NOISE = 1 / 4  # standard error of what arrived: half of a change is then two of them from all and from nothing
LEAST_SHOWN = 1 / 100  # KL of a change, as a part of that of rounding; its distance is then a tenth as large
SMALL_KL = LEAST_KL / HALF_WAY  # an adapter that changes less is compared with rounding
LENGTH = 48  # tokens of a prompt at most: all are cut to one length, so no padding is needed
PROMPTS = (
    "The water in the lake was cold and clear, and nobody had been out on it since the first snow of the winter fell.",
    "Question: A train leaves at 9:40 and arrives at 11:15. How long is the journey? Answer: It takes one hour and",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / values[0]",
    "Dear Ms Lee, thank you for your letter of 3 May. We are sorry that the lamp arrived broken, and we will send you",
    "The capital of France is Paris, the capital of Italy is Rome, the capital of Japan is Tokyo, and the capital of",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "known_for": "the first published program"}',
    "To make the soup, chop two onions and three carrots, fry them in oil for ten minutes, and add a litre of water.",
    "If every cat is an animal and some animals are black, does it follow that some cats are black? Explain why it",
)


@dataclass(frozen=True)
class Change:
    """What a merge did to one layer. cosine: of (merged - base) with the adapter's change; None if that is zero.

    arrived: how much of the change was added along its own direction: 1 is all of it, also under the noise of rounding.
    None if the change is zero, or if that noise hides it.
    """

    cosine: float | None
    nibbles_changed: float | None = None  # share of codes that differ from the base's; None for a 16-bit target
    arrived: float | None = None


@dataclass(frozen=True)
class Parity:
    """How far a merged model is from its adapter model. KL in nats a token; `agreement`: share of equal answers.

    verdict: "kept"; "too far" above most_kl; "erased" if most of a small change is lost, by the weights, or by the
    answers where the weights do not tell; "cannot be told" for an adapter that changed no more than rounding does.
    The first and the last pass.
    """

    target: str
    kl: float
    adapter_kl: float  # what the adapter changed: the same for the adapter model and its base
    agreement: float  # positions at which both hold the same token for the most likely one
    perplexity_before: float  # of the prompts, by the adapter model
    perplexity_after: float  # by the merged model
    tokens: int
    most_kl: float  # above which a merge is refused
    layers: dict[str, Change]
    base_kl: float = math.inf  # of the merged model from the base
    rounding_kl: float = 0.0  # of the base from itself, computed in another order; 0 for adapters above SMALL_KL

    @property
    def verdict(self) -> str:
        if not self.kl <= self.most_kl:  # NaN, too
            return "too far"
        is_told = self.adapter_kl > self.rounding_kl
        if is_told and self.kl <= HALF_WAY * self.adapter_kl:
            return "kept"
        # It passes only because the change is small: what is left of it decides, first in the weights.
        if self.arrived is not None and self.arrived < LEAST_ARRIVED:
            return "erased"
        if not is_told:
            return "cannot be told"
        return "erased" if self.arrived is None and self._is_nearer_to_base() else "kept"

    def _is_nearer_to_base(self) -> bool:
        """Rounding the weights moves the answers from both models alike, and hides a change that is far smaller."""
        noise = min(self.kl, self.base_kl)
        return self.base_kl < self.kl and self.adapter_kl > LEAST_SHOWN * noise

    @property
    def passes(self) -> bool:
        return self.verdict in ("kept", "cannot be told")

    @property
    def cosine(self) -> float | None:
        """The mean over layers of the cosine with the adapter's change."""
        cosines = [layer.cosine for layer in self.layers.values() if layer.cosine is not None]
        return fmean(cosines) if cosines else None

    @property
    def arrived(self) -> float | None:
        """The median over layers of `arrived`, of those that have one."""
        found = [layer.arrived for layer in self.layers.values() if layer.arrived is not None]
        return median(found) if found else None

    @property
    def nibbles_changed(self) -> float | None:
        """The mean over layers of the share of 4-bit codes that the merge changed."""
        shares = [layer.nibbles_changed for layer in self.layers.values() if layer.nibbles_changed is not None]
        return fmean(shares) if shares else None

    def figures(self) -> dict:
        """Return the figures of the whole model, by name; None for one that is infinite or was not measured."""
        figures = {name: value for name, value in asdict(self).items() if name != "layers"}
        figures |= {
            "cosine": self.cosine,
            "arrived": self.arrived,
            "nibbles_changed": self.nibbles_changed,
            "verdict": self.verdict,
        }
        return {name: None if value == math.inf else value for name, value in figures.items()}  # JSON has no infinity

    def as_json(self) -> str:
        layers = {path: asdict(change) for path, change in self.layers.items()}
        return json.dumps(self.figures() | {"layers": layers}, indent=2, allow_nan=False) + "\n"


def prompt_tokens(model: nn.Module, tokenizer: "Tokenizer") -> torch.Tensor:
    """Return the prompts' token ids, (prompts, tokens) int64. Raises ValueError if the model cannot read one."""
    rows = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in PROMPTS]
    length = min(LENGTH, *map(len, rows))
    if length < 2:  # a tokenizer that gives one token a text predicts nothing
        raise ValueError(f"the tokenizer makes {length} tokens of a sentence, but at least 2 are needed: mend it")
    ids = torch.tensor([row[:length] for row in rows], dtype=torch.int64)  # (prompts, tokens)
    check_tokens(model, tokenizer, set(ids.flatten().tolist()))
    return ids


def log_probabilities(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of each token's probability, (prompts, tokens, vocabulary) float32, on the CPU."""
    device = model.get_input_embeddings().weight.device
    device = torch.device("cpu") if device.type == "meta" else device  # layerwise.py
    with measuring(model):
        logits = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.float().cpu().log_softmax(-1)


@dataclass(frozen=True)
class Answers:
    """What three models say to the tokens `ids`: each as log_probabilities returns it."""

    ids: torch.Tensor
    base: torch.Tensor
    adapter: torch.Tensor
    merged: torch.Tensor


def compare(answers: Answers, target: str, layers: dict[str, Change], rounding_kl: float = 0.0) -> Parity:
    """Compare three models' answers. rounding_kl: as in Parity. Raises ValueError for NaN in an answer."""
    for which in ("base", "adapter", "merged"):
        if getattr(answers, which).isnan().any():
            raise ValueError(f"the {which} model answers with NaN, so nothing can be compared: check its weights")
    before = answers.adapter
    after = answers.merged
    ids = answers.ids
    adapter_kl = divergence(before, answers.base)
    return Parity(
        target=target,
        kl=divergence(before, after),
        adapter_kl=adapter_kl,
        agreement=(before.argmax(-1) == after.argmax(-1)).float().mean().item(),
        perplexity_before=_perplexity(before, ids),
        perplexity_after=_perplexity(after, ids),
        tokens=ids.numel(),
        most_kl=min(MOST_KL, max(LEAST_KL, HALF_WAY * adapter_kl)),
        layers=layers,
        base_kl=divergence(answers.base, after),
        rounding_kl=rounding_kl,
    )


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Return the KL divergence of `log_q` from `log_p`, both as log_probabilities returns them, in nats a token."""
    return max(fmean(map(_divergence, log_p, log_q)), 0.0)  # never negative, but a sum may be


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Return it for one prompt. In float64, so that a KL of 1e-12 is told from 0: float32 stops at 1e-7."""
    log_p = log_p.double().log_softmax(-1)  # (tokens, vocabulary)
    log_q = log_q.double().log_softmax(-1)
    return nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item() / len(log_p)


def _perplexity(log_p: torch.Tensor, ids: torch.Tensor) -> float:
    predicted = log_p[:, :-1].gather(-1, ids[:, 1:, None])  # of each token but the first: (prompts, tokens - 1, 1)
    return torch.exp(-predicted.double().mean()).item()  # infinity above 1.8e308, for which math.exp raises


def layer_change(added: torch.Tensor, learned: torch.Tensor, nibbles_changed: float | None = None) -> Change:
    """Compare what a merge added to a layer with the adapter's change, both float32 of one shape."""
    alignment = Alignment()
    alignment.add(added, learned)
    return Change(alignment.cosine(), nibbles_changed, alignment.arrived())


class Alignment:
    """The cosine of two tensors that are met piece by piece."""

    def __init__(self):
        self.count = 0
        self.product = 0.0
        self.squares = [0.0, 0.0]

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a piece of each, float32 of one shape."""
        a, b = a.flatten(), b.flatten()
        self.count += b.numel()
        self.product += torch.dot(a, b).item()
        self.squares[0] += torch.dot(a, a).item()
        self.squares[1] += torch.dot(b, b).item()

    def arrived(self) -> float | None:
        """Return how much of the second the first holds, in its direction: the slope of a line through the origin.

        None if the second is zero, or if the slope's standard error is above MOST_NOISE.
        """
        added, learned = self.squares
        if not learned:
            return None
        slope = self.product / learned
        residual = max(added - slope * self.product, 0.0)
        noise = math.sqrt(residual / learned / self.count)
        return slope if noise <= MOST_NOISE else None

    def cosine(self) -> float | None:
        """0 if nothing arrived in the first; None if the second is zero."""
        if not self.squares[1]:
            return None
        norms = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return min(max(self.product / norms, -1.0), 1.0) if norms > 0 else 0.0
