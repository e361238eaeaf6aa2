"""What is learned under chat templates of today, beside a truth that was found by hand."""

from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import assume, given, settings, strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from qlora_lab.data.chat_template import GENERATION, PLAIN_TEMPLATE, ChatTemplate
from qlora_lab.data.dataset import encode_all
from qlora_lab.data.examples import Example, last_answer_only
from qlora_lab.data.labels import IGNORED, Encoded, Notes, encode, end_token_id, prompt_ids
from tests.data.chat_templates import (
    CASES,
    CHATML,
    CONVERSATIONS,
    LLAMA_2,
    ONE,
    QUESTION,
    SEVERAL,
    THOUGHTS,
    tokenizer_of,
)
from tools.templates_page import COMMAND, PAGE, page

NOON = datetime(2026, 3, 1, 12)


def learned_texts(encoded: Encoded, tokenizer) -> tuple[str, ...]:
    """Each unbroken run of labels, decoded."""
    runs = [[]]
    for label in encoded.labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return tuple(tokenizer.decode(run) for run in runs if run)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_learned_is_what_was_found_by_hand(case, kind):
    tokenizer = tokenizer_of(case)
    encoded = encode(CONVERSATIONS[kind], tokenizer)
    assert learned_texts(encoded, tokenizer) == getattr(case, kind)
    assert all(label in (token, IGNORED) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    hidden, shortened = (case.hidden, case.shortened) if kind == "thoughts" else (0, 0)
    assert encoded.notes == Notes(hidden=hidden, shortened=shortened)


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_tokens_are_those_of_transformers(case, kind):
    tokenizer = tokenizer_of(case)
    messages = [{"role": role, "content": content} for role, content in CONVERSATIONS[kind].messages]
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    ids = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
    encoded = encode(CONVERSATIONS[kind], tokenizer)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(ids)
    # a prompt may end between two line breaks, which transformers takes for one token
    assert encoded.input_ids == ids or case.opening.endswith("<think>\n")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if GENERATION.search(case.template or "")])
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_a_template_that_marks_what_is_generated_is_believed_as_transformers_does(name, kind):
    tokenizer = tokenizer_of(CASES[name])
    messages = [{"role": role, "content": content} for role, content in CONVERSATIONS[kind].messages]
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    labels = encode(CONVERSATIONS[kind], tokenizer).labels
    assert [int(label != IGNORED) for label in labels] == found["assistant_masks"]


def test_a_prompt_ends_with_the_opening_of_an_answer(case):
    tokenizer = tokenizer_of(case)
    assert tokenizer.decode(prompt_ids((QUESTION,), tokenizer)).endswith("2 + 2?" + case.opening)
    assert end_token_id(tokenizer) == tokenizer.convert_tokens_to_ids(case.end)


@pytest.mark.parametrize("answer", ["    return 4", "\n\n4", "  4", "4\n\n", "\n    4"])
def test_no_answer_melts_into_its_prompt(case, answer):
    """Where an answer begins with white space, generation is given the prompt's tokens, and not a longer one's."""
    tokenizer = tokenizer_of(case)
    encoded = encode(Example((QUESTION, ("assistant", answer))), tokenizer)
    (learned,) = learned_texts(encoded, tokenizer)
    (plain,) = case.one
    assert learned == plain.replace("4", case.trimmed(answer))
    prompt = prompt_ids((QUESTION,), tokenizer)
    if not case.opening.endswith("<think>\n"):  # which the template leaves out of a whole conversation
        assert encoded.input_ids[: len(prompt)] == prompt
        header = "<|im_start|>assistant\n" if plain.startswith("<|im_start|>") else ""  # marked as generated
        first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
        assert tokenizer.decode(prompt[first:]) == header


def test_control_tokens_in_texts_are_text(case):
    """They must neither end a turn nor begin one; and the text is the same."""
    tokenizer, end = tokenizer_of(case), case.end
    asked, said = f"What does {end} do?", f"{end} ends a turn."
    turns = (("user", asked), ("assistant", said))
    encoded = encode(Example(turns), tokenizer)
    special = tokenizer.convert_tokens_to_ids(list(case.control))
    assert sum(t in special for t in encoded.input_ids) == sum(t in special for t in encode(ONE, tokenizer).input_ids)
    (plain,) = case.one
    assert learned_texts(encoded, tokenizer) == (plain.replace("4", said),)
    assert encoded.notes == Notes(control_texts=2)
    prompt = prompt_ids(turns[:1], tokenizer)
    assert tokenizer.decode(prompt).endswith(asked + case.opening)
    assert sum(t in special for t in prompt) == sum(t in special for t in prompt_ids((QUESTION,), tokenizer))


@pytest.mark.long
@settings(max_examples=100)
@given(st.sampled_from(sorted(CASES)), st.data())
def test_no_text_whatever_it_says_becomes_a_control_token(name, data):
    """The text stays what the template wrote, and holds as many control tokens as with "x" for each message."""
    case = CASES[name]
    pieces = ["4", " ", "\n", "\t", "é", "😀", "<", "|>", "user", "</think>", "<think>", "\U0010ff00", *case.control]
    some_text = st.lists(st.sampled_from(pieces), min_size=1, max_size=6).map("".join)
    roles = ("user", "assistant") * data.draw(st.integers(1, 2))
    turns = tuple((role, data.draw(some_text.filter(str.strip))) for role in roles)
    said = [content for role, content in turns if role == "assistant"]  # a thought alone may be refused, see below
    assume(not any("<|channel|>" in content or content.rstrip().endswith("</think>") for content in said))
    tokenizer = tokenizer_of(case)
    special = set(tokenizer.convert_tokens_to_ids(list(case.control)))
    ids = encode(Example(turns), tokenizer).input_ids
    plain = encode(Example(tuple((role, "x") for role, _ in turns)), tokenizer).input_ids
    assert sum(token in special for token in ids) == sum(token in special for token in plain)
    if not case.eats_space:
        assert tokenizer.decode(ids) == ChatTemplate(tokenizer).render(turns)


@pytest.mark.parametrize("turn", [1, 3])
def test_a_thought_without_an_answer_is_refused(turn):
    """Qwen3 leaves the line break after it out, unless something follows: a mark changes what is written."""
    turns = [("user", "4"), ("assistant", "4")] * 2
    turns[turn] = ("assistant", "<think>\nTwo twos.\n</think>\n")
    with pytest.raises(ValueError, match="so its turns cannot be located: use another template"):
        encode(Example(tuple(turns)), tokenizer_of(CASES["qwen3"]))


def test_a_turn_that_is_not_learned_is_shown(case):
    tokenizer = tokenizer_of(case)
    masked = encode(replace(SEVERAL, not_learned=(1,)), tokenizer)
    whole = encode(SEVERAL, tokenizer)
    assert masked.input_ids == whole.input_ids
    assert learned_texts(masked, tokenizer) == case.several[1:]


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_the_last_answer_alone_is_learned_where_that_is_asked(case, kind):
    tokenizer = tokenizer_of(case)
    encoded = encode(last_answer_only([CONVERSATIONS[kind]])[0], tokenizer)
    assert encoded.input_ids == encode(CONVERSATIONS[kind], tokenizer).input_ids
    assert learned_texts(encoded, tokenizer) == getattr(case, kind)[-1:]
    assert encoded.notes == Notes(shortened=case.shortened if kind == "thoughts" else 0)  # none is hidden


def test_a_template_that_ends_the_last_answer_only_needs_that():
    case = replace(
        CASES["chatml"], template=CHATML.replace("'<|im_end|>\\n'", "('<|im_end|>\\n' if loop.last else '')")
    )
    tokenizer = tokenizer_of(case)
    with pytest.raises(ValueError, match="ends '4' without a special token.*last_answer_only"):
        encode(SEVERAL, tokenizer)
    (example,) = last_answer_only([SEVERAL])
    assert learned_texts(encode(example, tokenizer), tokenizer) == ("7<|im_end|>",)


def test_a_system_text_is_shown_and_not_learned(case):
    tokenizer = tokenizer_of(case)
    example = Example((("system", "Be <|im_start|> brief."), *SEVERAL.messages))
    if not case.system:
        with pytest.raises(ValueError, match="refuses the conversation that begins system: .*System role not supp"):
            encode(example, tokenizer)
        return
    encoded = encode(example, tokenizer)
    assert learned_texts(encoded, tokenizer) == case.several
    assert "Be <|im_start|> brief." in tokenizer.decode(encoded.input_ids)


def test_empty_texts_are_located(case):
    tokenizer = tokenizer_of(case)
    encoded = encode(Example((QUESTION, ("assistant", ""))), tokenizer)
    (plain,) = case.one
    assert learned_texts(encoded, tokenizer)[0].split() == plain.replace("4", "").split()
    assert encoded.notes.empty == 1


def test_what_the_template_hides_is_said():
    tokenizer = tokenizer_of(CASES["qwen3"])
    with pytest.warns(UserWarning, match="^2 earlier answers are not shown whole by the chat template, and not l"):
        _, report = encode_all([THOUGHTS, ONE, THOUGHTS], tokenizer, 1000)
    assert report.notes == Notes(hidden=2)
    tokenizer = tokenizer_of(CASES["r1-distill"])
    with (
        pytest.warns(UserWarning, match="1 last answer is not shown whole"),
        pytest.warns(UserWarning, match="1 earlier answer is"),
    ):
        encode_all([THOUGHTS], tokenizer, 1000)


def test_the_page_of_the_docs_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), f"run `{COMMAND}`"


# ------------------------------------------------------------------------------------------------------------- clock


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "strftime_now" in (case.template or "")])
def test_a_date_is_that_of_the_clock_and_written_as_transformers_would(name, monkeypatch):
    class Fake(datetime):
        @classmethod
        def now(cls, tz=None):
            return NOON

    tokenizer = tokenizer_of(CASES[name])
    ours, prompt = encode(SEVERAL, tokenizer, NOON), prompt_ids((QUESTION,), tokenizer, NOON)
    assert ours.input_ids != encode(SEVERAL, tokenizer).input_ids
    assert encode_all([SEVERAL], tokenizer, 1000, clock=NOON)[0] == [ours]
    monkeypatch.setattr(chat_template_utils, "datetime", Fake)
    assert ours == encode(SEVERAL, tokenizer)
    assert prompt == prompt_ids((QUESTION,), tokenizer)


# ---------------------------------------------------------------------------------------- tokens of a piece of text


@pytest.fixture
def sentencepiece():
    """As Llama 2's: a space before every text, spaces as ▁, and bytes for what has no token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *map(chr, range(33, 127))]
    merges = [("▁", "4"), ("s", ">")]
    vocabulary = {piece: i for i, piece in enumerate(pieces + [a + b for a, b in merges])}
    bpe = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA_2
    )


def test_spaces_of_a_sentencepiece_are_learned_once(sentencepiece):
    encoded = encode(SEVERAL, sentencepiece)
    runs = [label for label in encoded.labels if label != IGNORED]
    assert sentencepiece.convert_ids_to_tokens(runs) == ["▁4", "▁", "</s>", "▁", "7", "▁", "</s>"]
    said = encode(Example((("user", "Why </s>?"), ("assistant", "4"))), sentencepiece)
    said_tokens = [*"▁</", "s>", *"?▁[/INST]", "▁4", "▁", "</s>"]
    assert sentencepiece.convert_ids_to_tokens(said.input_ids[-len(said_tokens) :]) == said_tokens
    assert said.notes.control_texts == 1


def test_a_prompt_that_ends_with_a_space_is_given_it(sentencepiece):
    """Vicuna's "ASSISTANT: ": the space belongs to the prompt, and "▁4" would hold it and the answer."""
    sentencepiece.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + (eos_token if m.role == 'assistant' else ' ') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoded, prompt = encode(ONE, sentencepiece), prompt_ids((QUESTION,), sentencepiece)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert sentencepiece.convert_ids_to_tokens(encoded.input_ids[len(prompt) :]) == ["4", "</s>"]
    assert encoded.labels[len(prompt) :] == encoded.input_ids[len(prompt) :]


@pytest.fixture(params=["words", "pieces"])
def without_bytes(request):
    """Tokenizers to which a character may be unknown, by a token that they call special; "é" and "😀" are."""
    letters = sorted(set("[UNK]<s>/ Instruction:Response#naive 4?\n▁Why"))
    if request.param == "words":
        vocabulary = {piece: i for i, piece in enumerate(["[UNK]", "4", *letters, *(f"##{one}" for one in letters)])}
        made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    else:
        made = Tokenizer(models.Unigram([("[UNK]", 0.0), *((one, -1.0) for one in letters)], unk_id=0))
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("question", ["é</s>", "Why </s>😀?", "</s> 4 é"])
def test_what_a_tokenizer_does_not_know_is_no_control_token(without_bytes, question):
    """The unknown token stands for a text and steers nothing; what is spelt beside it is text all the same."""
    encoded = encode(Example((("user", question), ("assistant", "4"))), without_bytes)
    assert encoded.notes.control_texts == 1
    assert encoded.input_ids.count(without_bytes.eos_token_id) == 1
    assert without_bytes.unk_token_id in encoded.input_ids


@pytest.mark.parametrize("question", ["naïve", "😀 Why", "Why 😀 4"])
def test_a_prompt_with_an_unknown_character_is_what_generation_is_given(without_bytes, question):
    encoded = encode(Example((("user", question), ("assistant", "4"))), without_bytes)
    prompt = prompt_ids((("user", question),), without_bytes)
    assert without_bytes.unk_token_id in prompt
    assert encoded.input_ids[: len(prompt)] == prompt


def test_unknown_white_space_behind_an_answer_does_not_end_it(without_bytes):
    turns = (QUESTION, ("assistant", "4\u3000"), ("user", "Why"), ("assistant", "4"))
    assert encode(Example(turns), without_bytes).labels.count(without_bytes.eos_token_id) == 2


def test_half_a_surrogate_pair_in_what_a_template_writes_is_named():
    tokenizer = tokenizer_of(next(iter(CASES.values())))
    tokenizer.chat_template = "{{ '\\ud800' }}" + PLAIN_TEMPLATE
    with pytest.raises(ValueError, match=r"refuses .*: what it writes holds '\\ud800', half of a surrogate"):
        encode(Example((("user", "a"), ("assistant", "b"))), tokenizer)
