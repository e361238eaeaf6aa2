"""What a cache has read is not read again, and never belongs to other weights."""

import pytest
import torch

import qlora_lab as ql
from qlora_lab.adapters.lora import adapters
from qlora_lab.infer import decode as module, fast
from qlora_lab.infer.chat import Chat
from qlora_lab.infer.decode import Decoding, decode
from qlora_lab.infer.prefix import weights_of
from qlora_lab.infer.sampling import Sampling
from qlora_lab.infer.stack import read_stack

pytestmark = pytest.mark.long
PROMPT = [5, 9, 17, 33, 2, 40, 7]


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """How many tokens each prompt that is read had. The readable step runs, so nothing is compiled."""
    counts = []
    original = module.read_prompt

    def counted(stack, ids, cache, row=0, in_int8=False):
        counts.append(len(ids))
        return original(stack, ids, cache, row, in_int8)

    monkeypatch.setattr(module, "read_prompt", counted)
    monkeypatch.setattr(fast, "can_step", lambda stack: False)
    return counts


def answered(model, tokenizer, ids, prefix=None, **how):
    run = Decoding(model, tokenizer, [ids], 6, **how)
    run.prefix, run.remember = prefix, True
    for _ in run:
        pass
    return run


def test_a_longer_text_reads_what_is_new(packed, tokenizer, read):
    first = answered(packed, tokenizer, PROMPT)
    longer = [*PROMPT, *first.answers[0].ids, 8, 3]
    second = answered(packed, tokenizer, longer, first.prefix)
    # six tokens were said, and five of them read; the last token of a prompt belongs to the first step
    assert read == [len(PROMPT) - 1, len(longer) - 1 - (len(PROMPT) + 5)]
    assert second.answers == decode(packed, tokenizer, [longer], 6, progress=False)
    assert second.prefix.ids == [[*longer, *second.answers[0].ids[:5]]]


def test_another_text_reads_from_the_first_difference(packed, tokenizer, read):
    first = answered(packed, tokenizer, PROMPT)
    other = [*PROMPT[:4], 50, 51, 52]
    second = answered(packed, tokenizer, other, first.prefix)
    assert read == [len(PROMPT) - 1, 2]
    assert second.answers == decode(packed, tokenizer, [other], 6, progress=False)


def test_the_same_text_and_a_shorter_one_read_nothing(packed, tokenizer, read):
    first = answered(packed, tokenizer, PROMPT)
    for ids in (PROMPT, PROMPT[:3], PROMPT[:1]):
        assert answered(packed, tokenizer, ids, first.prefix).answers == answered(packed, tokenizer, ids).answers
    assert read == [len(PROMPT) - 1, 0, len(PROMPT) - 1, 0, 2, 0, 0]


def by_data(model):
    model.model.layers[1].self_attn.k_proj.lora_B.data.normal_()  # no version counter notices


def by_numpy(model):
    model.model.layers[1].mlp.up_proj.lora_A.detach().numpy()[0, 0] += 1


def a_code(model):
    model.model.layers[0].mlp.up_proj.base.weight.packed[3] ^= 1


def a_constant(model):
    model.model.layers[0].self_attn.q_proj.base.weight.constants.absmax_scale[0] *= 2


def the_rows(model):
    packed = model.model.layers[0].self_attn.k_proj.base.weight.packed
    packed.copy_(packed.view(64, -1).flip(0).flatten())


def a_norm(model):
    model.model.layers[0].input_layernorm.weight.data[0] *= 2


def an_embedding(model):
    model.model.embed_tokens.weight.data[7, 3] += 1


def the_scaling(model):
    model.model.layers[1].self_attn.k_proj.scaling *= 2


def the_angles(model):
    model.model.rotary_emb.inv_freq *= 2


def the_adapter(model):
    ql.remove_adapter(model)


CHANGES = [by_data, by_numpy, a_code, a_constant, the_rows, a_norm, an_embedding, the_scaling, the_angles, the_adapter]


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_read_everything(change, packed, tokenizer, read):
    model = ql.add_lora(packed, 2)
    for adapter in adapters(model).values():
        adapter.lora_B.data.normal_(std=0.1)
    first = answered(model, tokenizer, PROMPT)
    change(model)
    second = answered(model, tokenizer, PROMPT, first.prefix)
    assert read == [len(PROMPT) - 1] * 2
    assert second.answers == decode(model, tokenizer, [PROMPT], 6, progress=False)


OTHER = {"cache_bits": Sampling(cache_bits=8), "int8": Sampling(int8=True)}


@pytest.mark.parametrize("sampling", OTHER.values(), ids=OTHER)
def test_other_bits_read_everything_and_their_own_nothing(sampling, packed, tokenizer, read):
    first = answered(packed, tokenizer, PROMPT)
    narrow = answered(packed, tokenizer, PROMPT, first.prefix, sampling=sampling)
    assert read == [len(PROMPT) - 1] * 2
    assert narrow.answers == decode(packed, tokenizer, [PROMPT], 6, sampling, progress=False)
    longer = [*PROMPT, *narrow.answers[0].ids, 8]
    taken = answered(packed, tokenizer, longer, narrow.prefix, sampling=sampling)
    assert read[3:] == [1] and len(taken.answers[0].ids) == 6
    answered(packed, tokenizer, PROMPT, narrow.prefix)
    assert read[4:] == [len(PROMPT) - 1]


def test_the_base_and_the_adapter_have_their_own(packed, tokenizer, read):
    model = ql.add_lora(packed, 2)
    first = answered(model, tokenizer, PROMPT)
    answered(model, tokenizer, PROMPT, first.prefix, adapter=False)
    assert read == [len(PROMPT) - 1] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_tensor_counts_whatever_its_size_and_place(dtype, packed):
    stack = read_stack(packed)
    for size in (1, 3, 4, 5, 8, 13, 4097, 4099):
        storage = torch.zeros(size + 1, dtype=dtype)
        norm = storage[1:]  # at an odd place
        before = weights_of(stack._replace(norm=norm))
        for i in (*range(min(size, 13)), size - 1):
            norm[i] = 1
            assert weights_of(stack._replace(norm=norm)) != before, i
            norm[i] = 0
        assert weights_of(stack._replace(norm=norm.clone())) == before
        turned = torch.zeros(2, size, dtype=dtype).t()  # not contiguous
        assert weights_of(stack._replace(norm=turned)) != weights_of(stack._replace(norm=turned + 1))


@pytest.mark.parametrize("size", [256, 5000], ids=["small", "large"])
def test_other_signs_are_other_weights(size, packed):
    """A sum over words loses changes that cancel: as many signs that come as go, or two top bits."""
    stack = read_stack(packed)
    norm = torch.rand(size) + 1
    norm[::4] *= -1
    norm[1::4] *= -1
    assert weights_of(stack._replace(norm=norm)) != weights_of(stack._replace(norm=-norm))
    assert weights_of(stack._replace(norm=norm)) != weights_of(stack._replace(norm=norm.flip(0)))
    few = norm.clone()
    few[[1, 3]] *= -1
    columns = norm.view(-1, 8).clone()
    columns[:, 1] *= -1
    assert len({weights_of(stack._replace(norm=tensor)) for tensor in (norm, few, columns.view(-1))}) == 3


def test_what_is_left_is_taken_up_without_reading(packed, tokenizer, read):
    whole = decode(packed, tokenizer, [PROMPT, PROMPT[:3]], 6, progress=False)
    for remember, again in ((True, [0, 0]), (False, [len(PROMPT) - 1, 1, 2, 1])):
        del read[:]
        run = Decoding(packed, tokenizer, [PROMPT, PROMPT[:3]], 6)
        run.remember = remember
        next(iter(run))
        assert list(run) and run.answers == whole
        assert read[:2] == [len(PROMPT) - 1, 2] and read[2:] == again
        assert (run.prefix is not None) == remember


def test_of_two_iterations_the_earlier_one_ends(packed, tokenizer, read):
    """Its cache misses what the later one says, and its end must not replace the later one's prefix."""
    run = Decoding(packed, tokenizer, [PROMPT], 6)
    run.remember = True
    earlier, later = iter(run), iter(run)
    next(earlier), next(later)
    with pytest.raises(ValueError, match="another iteration over these answers has begun: go on with that one"):
        next(earlier)
    assert list(later) and run.answers == decode(packed, tokenizer, [PROMPT], 6, progress=False)
    assert run.prefix.ids == [[*PROMPT, *run.answers[0].ids[:5]]]


@pytest.mark.filterwarnings("ignore:.*transformers' generate answers")
def test_transformers_leaves_no_prefix(packed, tokenizer, read):
    first = answered(packed, tokenizer, PROMPT)
    packed.model.norm.register_forward_hook(lambda *given: None)
    assert first.prefix is not None and answered(packed, tokenizer, PROMPT, first.prefix).prefix is None


def test_a_prefix_of_other_rows_is_not_used(packed, tokenizer, read):
    two = Decoding(packed, tokenizer, [PROMPT, PROMPT[:3]], 6)
    assert list(two)
    answered(packed, tokenizer, PROMPT, two.prefix)
    assert read == [len(PROMPT) - 1, 2, len(PROMPT) - 1]


def test_a_conversation_reads_each_turn_once(packed, tokenizer, read):
    chat = Chat(packed, tokenizer, 6)
    said = ["".join(chat.ask(question)) for question in "abc"]
    fresh = Chat(packed, tokenizer, 6)
    fresh.turns = chat.turns[:-2]  # the turns before the last question
    assert "".join(fresh.ask("c")) == said[-1]
    # read[3] is the whole conversation; a random answer's letters need not come back as the same tokens
    assert read[0] + read[1] < read[3] - read[2]
    chat.reset()
    assert "".join(chat.ask("a")) == said[0] and read[4] == read[0]


def test_an_interrupted_answer_keeps_what_was_read(packed, tokenizer, read):
    chat = Chat(packed, tokenizer, 20)
    pieces = chat.ask("a")
    next(pieces)
    pieces.close()
    fresh = Chat(packed, tokenizer, 20)
    fresh.turns = [*chat.turns]
    said = "".join(chat.ask("b"))
    assert "".join(fresh.ask("b")) == said and read[1] <= read[2] - read[0]
