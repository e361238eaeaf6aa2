"""Ask a model that sees about pictures of toy-shapes: what it answers, and how sure it is.

In: a LLaVA model, its tokenizer, scenes (data/shapes.py). Out: the probabilities of the words, and what is right.
An answer is one token, so one forward pass without generation is enough. It is right if no other token of the whole
vocabulary is more probable: nobody helps the model by naming the six colours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from tqdm.auto import tqdm

from qlora_lab.data.pictures import PLACEHOLDER
from qlora_lab.data.shapes import ASKED, BLANK, WORDS, Scene
from qlora_lab.model.modes import measuring
from qlora_lab.train.toy_llava import first_tokens, pixels

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 24  # pictures at once: 330 tokens


@dataclass(frozen=True)
class Seen:
    """Answers to one question about several pictures."""

    probabilities: torch.Tensor  # (scenes, words) float32, of the words of WORDS; they leave the rest to other tokens
    right: torch.Tensor  # (scenes,) bool: the right word is the most probable of all tokens


def see(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    scenes: Sequence[Scene],
    asked: str,
    *,
    blank: bool = False,
    progress: bool = True,
) -> Seen:
    """Ask for one property of each scene: "colour", "shape", "number" or "side".

    blank: show a plain grey picture each time, for a model that learned from such pictures.
    Raises ValueError for another property, no scenes, or a tokenizer that begins two words with the same token.
    """
    if asked not in ASKED:
        raise ValueError(f"asked={asked!r:.40} is not known: choose from {', '.join(ASKED)}")
    if not scenes:
        raise ValueError("there are no scenes: give at least one")
    words = first_tokens(WORDS[asked], tokenizer)
    if len(set(words)) < len(words):
        raise ValueError(
            f"two of {', '.join(WORDS[asked])} begin with the same token: ask a model with another tokenizer"
        )
    question = [{"role": "user", "content": f"{PLACEHOLDER}\n{ASKED[asked]}"}]
    text = tokenizer.processor.apply_chat_template(question, tokenize=False)
    prompt = tokenizer.processor(text=[text], images=[Image.fromarray(BLANK)], return_tensors="pt").input_ids
    wanted = torch.tensor([words[WORDS[asked].index(getattr(scene, asked))] for scene in scenes], dtype=torch.int64)
    found = []
    with measuring(model):
        for start in tqdm(range(0, len(scenes), ROWS), f"{asked}?", unit="batch", leave=False, disable=not progress):
            shown = pixels(scenes[start : start + ROWS])  # (rows, 3, 48, 48)
            if blank:
                shown = torch.full_like(shown, BLANK[0, 0, 0] / 127.5 - 1)
            ids = prompt.expand(len(shown), -1).to(model.device)
            # The head at the last place alone: it is a fifth of the work.
            out = model(input_ids=ids, pixel_values=shown.to(model.device, model.dtype), logits_to_keep=1)
            found.append(out.logits[:, -1].float().softmax(-1).cpu())  # (rows, vocabulary)
    shares = torch.cat(found)
    return Seen(shares[:, words], shares.argmax(1) == wanted)
