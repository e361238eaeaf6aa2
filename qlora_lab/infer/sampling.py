"""Choose the next token of one row from its logits: the likeliest, or a draw.

In: logits (vocabulary,) float32, and the tokens so far. Out: an id. The options mean what they mean in transformers,
and act in its order: repetition penalty (Keskar et al., arXiv 1909.05858, section 4.1), temperature, top-p (Holtzman
et al., arXiv 1904.09751, section 3.1).
"""

from dataclasses import dataclass

import torch

from qlora_lab.data.examples import check_text
from qlora_lab.infer.cache import BITS
from qlora_lab.quant.numbers import check_number, check_seed

LEAST, MOST = 0.01, 100  # logits that are multiplied or divided by these stay far from the limits of float32
SCALES = f"from {LEAST} to {MOST}"
FEW = 1000  # tokens among which top-p is looked for first


def is_scale(value: float) -> bool:
    """Whether logits may be multiplied and divided by it."""
    return LEAST <= value <= MOST


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, which text ends an answer, and in how many bits it is computed.

    Raises ValueError for a value that is not allowed.
    """

    temperature: float = 0.0  # logits are divided by it; 0: no draw, the likeliest token
    top_p: float = 1.0  # draw among the likeliest tokens that have this share together; 1: among all
    repetition_penalty: float = 1.0  # logits of tokens that are there are divided by it, negative ones multiplied
    seed: int = 0  # row i of several draws with seed + i: its text does not depend on its neighbours
    stop: str | tuple[str, ...] = ()  # texts that end an answer, and do not belong to it
    cache_bits: int = 32  # of keys and values; 8: a bit more than a quarter of the memory, not exact (cache.py)
    int8: bool = False  # layers compute in int8, prompts and tokens: faster, not exact (int8.py)

    def __post_init__(self) -> None:
        check_number(
            "temperature", self.temperature, lambda x: x == 0 or is_scale(x), f"0, for the likeliest token, or {SCALES}"
        )
        check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(
                f"top_p={self.top_p!r} needs draws, but temperature is 0: set a temperature, for example 0.8"
            )
        check_number("repetition_penalty", self.repetition_penalty, is_scale, f"{SCALES}; 1 changes nothing")
        check_seed(self.seed)
        several = isinstance(self.stop, (tuple, list))  # no iterator: it would be empty at its second use
        if not (several or isinstance(self.stop, str)) or not all(isinstance(t, str) and t for t in self.stops):
            raise ValueError(f"stop={self.stop!r:.60} is not allowed: it is a text, or several, none of them empty")
        if isinstance(self.cache_bits, bool) or self.cache_bits not in BITS:
            raise ValueError(f"cache_bits={self.cache_bits!r:.60} is not allowed: it is {' or '.join(map(str, BITS))}")
        if not isinstance(self.int8, bool):
            raise ValueError(f"int8={self.int8!r:.60} is not allowed: it is True or False")
        for text in self.stops:
            check_text(text, "a stop")  # what no tokenizer writes would never be found
        if several:
            object.__setattr__(self, "stop", self.stops)  # which nobody can change

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as several."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Chooser:
    """Chooses the tokens that follow one prompt."""

    def __init__(self, sampling: Sampling, prompt: list[int], row: int = 0):
        self._sampling = sampling
        self._prompt = frozenset(prompt)
        self._generator = torch.Generator().manual_seed(sampling.seed + row)
        self._begun = -1, self._generator.get_state()  # place of the last draw, and the state before it

    def choose(self, logits: torch.Tensor, said: list[int]) -> int:
        """Return the id of the token that follows `said`. logits: (vocabulary,) float32, left as they are.

        A second call for the same place draws the same again: Ctrl-C may have come before the first was written down.
        """
        sampling = self._sampling
        if sampling.repetition_penalty != 1:
            logits = penalised(logits, sorted(self._prompt.union(said)), sampling.repetition_penalty)
        if sampling.temperature == 0:
            return int(logits.argmax())
        place, state = self._begun
        if place == len(said):
            self._generator.set_state(state)
        else:
            self._begun = len(said), self._generator.get_state()
        shares = kept(torch.softmax(logits / sampling.temperature, 0), sampling.top_p)
        return int(torch.multinomial(shares, 1, generator=self._generator))


def penalised(logits: torch.Tensor, seen: list[int], penalty: float) -> torch.Tensor:
    """Return logits (vocabulary,) in which those of `seen` are lower, for a penalty above 1."""
    changed = logits.clone()
    own = logits[seen]
    changed[seen] = torch.where(own > 0, own / penalty, own * penalty)
    return changed


def kept(shares: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return shares (vocabulary,) with zeros but for the likeliest tokens that reach top_p together; at least one."""
    if top_p == 1:
        return shares
    # of 49,152, sorting all takes ten times as long as finding the first thousand, which mostly suffice
    ordered, order = shares.topk(min(FEW, len(shares)))
    if ordered.sum() < top_p:
        ordered, order = shares.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered  # what the likelier ones have together
    count = max(1, int((before < top_p).sum()))  # float32 makes a tiny top_p zero
    return torch.zeros_like(shares).index_copy(0, order[:count], ordered[:count])
