"""Multiple choice: MMLU's prompts to the letter, log-likelihoods of whole rows, and a cache that changes nothing."""

from dataclasses import replace

import pytest
import torch

from qlora_lab.adapters.add_adapter import add_adapter
from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.data.choice_files import ChoiceQuestion, Questions, read_questions
from qlora_lab.data.choice_prompts import Task, examples, prompt
from qlora_lab.measure import multiple_choice as module
from qlora_lab.measure.multiple_choice import choice_scores, encode
from tests.data.test_choice_files import small_questions
from tools.families import FAMILIES, quiet, save, theirs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def questions(tmp_path):
    return read_questions(small_questions(tmp_path / "mmlu"))


MMLU = """The following are multiple choice questions (with answers) about  abstract algebra.

one
A. 1
B. 2
C. 3
D. 4
Answer: A

"""  # evaluate.py of github.com/hendrycks/test: gen_prompt(dev, "abstract_algebra", 1); two spaces before the subject


def test_prompts_of_mmlu_s_own_evaluation(questions):
    assert examples(Task(questions, 1), "abstract_algebra") == MMLU
    assert prompt(questions.test[0], "letters") == "three\nlines, here\nA. 1\nB. 2\nC. None\nD. 04\nAnswer:"


def test_prompts_of_texts(questions):
    """lm-evaluation-harness' mmlu_continuation."""
    assert examples(Task(questions, 1, "texts"), "abstract_algebra") == (
        "The following are questions (with answers) about abstract algebra.\n\nQuestion: one\nAnswer: 1\n\n"
    )
    assert prompt(questions.test[1], "texts") == "Question: four\nAnswer:"


def from_whole_rows(model, encoded) -> list[list[float]]:
    """The definition: log p of each token given all before it, one row for each answer."""
    found = []
    for one in encoded:
        found.append([])
        for answer in one.answers:
            with torch.no_grad():
                logs = model(torch.tensor([one.context + answer]), use_cache=False).logits[0].log_softmax(-1)
            places = range(len(one.context) - 1, len(one.context) + len(answer) - 1)
            found[-1].append(sum(logs[i, token].item() for i, token in zip(places, answer, strict=True)))
    return found


@pytest.mark.parametrize("way", ["letters", "texts"])
@pytest.mark.parametrize("shots", [0, 1, 2])
def test_shared_prefixes_change_nothing(tiny_llama, tokenizer, questions, way, shots, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 150)  # some batches of one question, some of more
    task = Task(questions, shots, way)
    want = from_whole_rows(tiny_llama, encode(tokenizer, task))
    scores = choice_scores(tiny_llama, tokenizer, task, progress=False)
    for one, values in zip(scores, want, strict=True):
        assert one == pytest.approx(values, abs=1e-4)  # float32 sums in another order
    again = choice_scores(tiny_llama, tokenizer, task, encoded=encode(tokenizer, task), progress=False)
    assert again == scores


def test_a_cache_is_used(tiny_llama, tokenizer, questions):
    """Without it, each of four questions reads its examples four times."""
    read = []
    hook = tiny_llama.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numel()))
    task = Task(questions, 2)
    choice_scores(tiny_llama, tokenizer, task, progress=False)
    hook.remove()
    whole = sum(len(one.context) + len(row) - 1 for one in encode(tokenizer, task) for row in one.answers)
    assert sum(read) < whole / 4


def test_an_adapter_counts(tiny_llama, tokenizer, questions):
    task = Task(questions, 1, "texts")
    base = choice_scores(tiny_llama, tokenizer, task, progress=False)
    add_lora(tiny_llama, r=2)
    for layer in adapters(tiny_llama).values():
        layer.lora_B.data.normal_()
    adapted = choice_scores(tiny_llama, tokenizer, task, progress=False)
    want = from_whole_rows(tiny_llama.eval(), encode(tokenizer, task))
    assert adapted[0] == pytest.approx(want[0], abs=1e-4)
    assert adapted[0] != pytest.approx(base[0], abs=1e-2)


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_virtual_tokens_come_before_each_row(tiny_llama, tokenizer, questions, method):
    add_adapter(tiny_llama, method, virtual_tokens=3)
    task = Task(questions, 1, "texts")
    scores = choice_scores(tiny_llama, tokenizer, task, progress=False)
    want = from_whole_rows(tiny_llama.eval(), encode(tokenizer, task))
    assert scores[0] == pytest.approx(want[0], abs=1e-4)


def test_a_model_with_a_window_is_read_whole(tokenizer, questions):
    """Its cache forgets the beginning, so it cannot be shared."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=280, num_key_value_heads=2, sliding_window=8, initializer_range=0.5, **shape)
    ).eval()
    task = Task(questions, 1, "texts")
    scores = choice_scores(model, tokenizer, task, progress=False)
    for one, values in zip(scores, from_whole_rows(model, encode(tokenizer, task)), strict=True):
        assert one == pytest.approx(values, abs=1e-4)


# one of each way to count positions, to mask, and to remember
UNLIKE = ["Llama", "Gemma 2", "MPT", "BLOOM", "OPT", "BioGPT", "XGLM", "GPT-2", "GPT-J", "RecurrentGemma", "Mamba"]
UNLIKE += ["DeepSeek-V3", "GPT-OSS", "Falcon", "GPT-Neo"]
# alibi comes from a mask of two dimensions; a window of places in the cache, not of positions
OTHERWISE = {"Falcon": {"alibi": True}, "GPT-Neo": {"window_size": 6}}
BESIDE = {
    "Llama",
    "OPT",
    "BioGPT",
    "XGLM",
    "GPT-2",
    "GPT-J",
    "DeepSeek-V3",
}  # families that keep to the mask and the positions


@pytest.mark.slow
@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name in UNLIKE], ids=lambda one: one.name)
def test_answers_side_by_side_in_each_family(tmp_path, family, monkeypatch):
    """Families that do not keep to the mask and the positions are found by trying, and read an answer a row."""
    ways = []
    monkeypatch.setattr(module, "_fitting", lambda *a, choose=module._fitting: ways.append(choose(*a)) or ways[-1])
    with quiet():
        save(replace(family, options=family.options | OTHERWISE.get(family.name, {})), tmp_path)
        model = theirs(tmp_path)
    encoded = [
        module.Encoded([3, 17, 5, 40], ([8, 2, 7], [21], [2, 33, 11, 6], [9, 9])),
        module.Encoded([3, 17, 6, 41, 4], ([8, 3], [22, 2], [2, 30], [10, 12, 13])),
        module.Encoded([3, 17, 6, 41, 4, 44, 2, 50], ([8], [21, 9], [31, 33, 6, 6], [9, 9])),
    ]
    with torch.no_grad():
        found = dict(module._of_subject(model, dict(enumerate(encoded)), fill=1))
    for number, want in enumerate(from_whole_rows(model, encoded)):
        assert found[number] == pytest.approx(want, abs=1e-4)
    assert (ways == [module._side_by_side]) == (family.name in BESIDE), ways


def test_measuring_changes_nothing(tiny_llama, tokenizer, questions):
    tiny_llama.train()
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    state = torch.get_rng_state()
    choice_scores(tiny_llama, tokenizer, Task(questions, 1), progress=False)
    assert tiny_llama.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())
    assert all(not layer._forward_pre_hooks for layer in tiny_llama.modules())


# -------------------------------------------------------------------------------------------------------------- errors


def whole_prompts() -> Questions:
    return Questions("prompts", (ChoiceQuestion("x", "", (), 0, "Which?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"),), {})


def test_whole_prompts_are_read_as_they_are(tiny_llama, tokenizer):
    task = Task(whole_prompts())
    (one,) = choice_scores(tiny_llama, tokenizer, task, progress=False)
    assert one == pytest.approx(from_whole_rows(tiny_llama, encode(tokenizer, task))[0], abs=1e-4)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"way": "words"}, "way='words' is not known: choose from letters, texts"),
        ({"shots": -1}, "shots=-1 is not allowed"),
        (
            {"shots": 3},
            "mmlu: 'abstract_algebra' has 2 examples in dev/abstract_algebra_dev.csv, but shots=3: take --shots",
        ),
        ({"questions": Questions("empty", (), {})}, "empty holds no questions"),
        ({"questions": whole_prompts(), "way": "texts"}, "holds whole prompts, which list the options"),
        ({"questions": whole_prompts(), "shots": 5}, "examples included: leave out --shots"),
    ],
)
def test_a_task_that_cannot_be_asked(tokenizer, questions, change, said):
    with pytest.raises(ValueError, match=said):
        encode(tokenizer, Task(**({"questions": questions, "shots": 1} | change)))


def test_a_subject_without_examples(tokenizer, tmp_path):
    folder = small_questions(tmp_path / "mmlu")
    (folder / "dev" / "anatomy_dev.csv").unlink()
    questions = read_questions(folder)
    with pytest.raises(ValueError, match="'anatomy' has no dev/anatomy_dev.csv, but shots=5: take --shots 0"):
        encode(tokenizer, Task(Questions("mmlu", questions.test[2:], questions.dev)))
    (folder / "dev" / "anatomy_dev.csv").touch()
    with pytest.raises(ValueError, match="'anatomy' has an empty dev/anatomy_dev.csv, but shots=5: take --shots 0"):
        encode(tokenizer, Task(Questions("mmlu", questions.test[2:], read_questions(folder).dev)))


def test_a_prompt_that_is_too_long_names_the_most_examples_that_fit(tiny_llama, tokenizer, questions):
    longest = {shots: module._longest(encode(tokenizer, Task(questions, shots))) for shots in (0, 1, 2)}
    tiny_llama.config.max_position_embeddings = longest[1]
    said = f"the longest prompt has {longest[2]} tokens, but LlamaForCausalLM was made for {longest[1]}: take --shots 1"
    with pytest.raises(ValueError, match=said):
        choice_scores(tiny_llama, tokenizer, Task(questions, 2), progress=False)
    choice_scores(tiny_llama, tokenizer, Task(questions, 1), progress=False)
    tiny_llama.config.max_position_embeddings = longest[0] - 1
    with pytest.raises(ValueError, match="fewer examples do not help: leave that question out"):
        choice_scores(tiny_llama, tokenizer, Task(questions, 2), progress=False)


def test_a_tokenizer_that_appends_a_token(questions):
    """With an EOS after the prompt, the first token of each answer would be lost without a word."""

    def words(texts, verbose):
        return {"input_ids": [[*map(hash, text.split()), 2] for text in texts]}

    with pytest.raises(ValueError, match="abstract_algebra: with an answer, the prompt of question 1 has other tokens"):
        encode(words, Task(questions, 1))


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_option_is_refused_before_a_model_is_loaded(tmp_path, empty):
    folder = small_questions(tmp_path / "mmlu")
    path = folder / "test" / "anatomy_test.csv"
    path.write_text(f"the sum,a,b,c,d,D\nthe numbers,a,b,{empty},d,A\n")
    questions = read_questions(folder)
    Task(questions, 1).checked()  # a letter may stand for nothing
    with pytest.raises(ValueError, match="anatomy_test.csv, line 2: option C is empty: give it a text, or take --answ"):
        Task(questions, 1, "texts").checked()
    made = Questions("made", (ChoiceQuestion("x", "Which?", ("a", "b", empty, "d"), 0),), {})
    with pytest.raises(ValueError, match="made, x: 'Which.': option C is empty"):
        Task(made, 0, "texts").checked()


def test_an_option_without_tokens(questions):
    """Some tokenizers drop characters, and the space before them."""
    question = ChoiceQuestion("anatomy", "Which?", ("\u200b", "b", "c", "d"), 1)

    def words(texts, verbose):
        return {"input_ids": [[hash(word) for word in text.replace("\u200b", "").split()] for text in texts]}

    with pytest.raises(ValueError, match="anatomy: an option of question 1 has no tokens: give each option a text"):
        encode(words, Task(Questions("any", (question,), {}), 0, "texts"))


def test_a_token_without_an_embedding(tiny_llama, tokenizer, questions):
    tiny_llama.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="but the embedding has 100 rows"):
        choice_scores(tiny_llama, tokenizer, Task(questions, 1), progress=False)
