"""Answer many questions at once, each with the adapter that a function chooses for it.

    generate_routed(bank, tokenizer, questions, lambda text: "german" if "ß" in text else "french")

In: an AdapterBank, and a callable from a question to a name of the bank or None: rules, a classifier, or a model.
Out: answers, in the order of the questions.
Not here: the product of a batch whose rows use different adapters (adapters/many.py).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qlora_lab.adapters.many import AdapterBank
from qlora_lab.data.dataset import Prompt, prompt_ids
from qlora_lab.measure.held_out import answers_to
from qlora_lab.quant.numbers import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def generate_routed(
    bank: AdapterBank,
    tokenizer: "Tokenizer",
    questions: Sequence[str],
    route: Callable[[str], str | None],
    max_new_tokens: int = 128,
    *,
    progress: bool = True,
) -> list[str]:
    """Answer each question greedily, as `generate` does, with the adapter that `route(question)` names.

    None: the base answers. Questions of all adapters share batches, and the bank's model is as before afterwards.
    Raises ValueError for no questions, a name that the bank does not have, an adapter that is no LoRA, and what
    `generate` raises.
    """
    check_whole("max_new_tokens", max_new_tokens)
    if isinstance(questions, str):
        raise ValueError(f"questions is the text {questions[:20]!r}: give a list of texts")
    names = [route(question) for question in questions]
    bank.check_rows(names)  # before anything is answered
    prompts = [Prompt(prompt_ids((("user", question),), tokenizer)) for question in questions]

    def routed(batch: list[int]):
        return bank.rows([names[number] for number in batch])

    return answers_to(bank.model, tokenizer, prompts, max_new_tokens, progress, routed)
