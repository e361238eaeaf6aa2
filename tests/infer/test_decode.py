"""Answers: greedy ones equal transformers', rows do not depend on each other, and every end is told."""

import math
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import GemmaConfig, GenerationConfig
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import qlora_lab as ql
from bench import decode_equal
from qlora_lab.adapters.adapter import learned
from qlora_lab.adapters.lora import adapters
from qlora_lab.infer import decode as decoding, fast
from qlora_lab.infer.chat import Chat
from qlora_lab.infer.decode import Decoding, decode
from qlora_lab.infer.pieces import HALF, Pieces
from qlora_lab.infer.sampling import Chooser, Sampling, kept, penalised
from qlora_lab.infer.stack import read_stack
from qlora_lab.infer.step import step
from qlora_lab.kernels import cpu
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.train.interrupt import Terminated
from tests.infer.conftest import dequantised, small

PROMPTS = ["the sum of", "user and assistant", "numbers"]


@pytest.fixture(autouse=True)
def readable_only(request, monkeypatch):
    """The kernel is compiled once for 1 row and once for 4, 10 s each: fast tests take the readable step."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(fast, "can_step", lambda stack: False)


def generated(model, ids: list[int], new: int) -> list[int]:
    how = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    with torch.no_grad():
        rows = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), generation_config=how)
    return rows[0, len(ids) :].tolist()


def greedy_is_transformers(model, tokenizer, new: int) -> None:
    answers = decode(model, tokenizer, PROMPTS, new, progress=False)
    twin = dequantised(model)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = generated(twin, tokenizer(prompt)["input_ids"], new)
        assert answer.ids == expected and answer.ended == "length"
        # an answer that is cut does not end in half a character
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True).rstrip(HALF)


@pytest.mark.long
def test_greedy_answers_are_those_of_transformers(packed, tokenizer):
    greedy_is_transformers(packed, tokenizer, 16)


@pytest.mark.slow
def test_the_kernel_s_greedy_answers_are_those_of_transformers(packed, tokenizer):
    greedy_is_transformers(packed, tokenizer, 40)


@pytest.mark.long
def test_an_end_token_ends_a_row_and_not_the_others(packed, tokenizer):
    free = decode(packed, tokenizer, PROMPTS, 12, progress=False)
    end = free[0].ids[5]
    packed.generation_config.eos_token_id = end
    ended = decode(packed, tokenizer, PROMPTS, 12, progress=False)
    for before, after in zip(free, ended, strict=True):
        cut = before.ids.index(end) if end in before.ids else None
        assert after.ids == before.ids[:cut]
        assert after.ended == ("length" if cut is None else "end")
    assert ended[0].ended == "end"


@pytest.mark.long
def test_pieces_are_the_answer(packed, tokenizer):
    run = Decoding(packed, tokenizer, PROMPTS, 10)
    texts = ["", "", ""]
    for piece in run:
        assert piece.text
        texts[piece.row] += piece.text
    assert texts == [answer.text for answer in run.answers]
    assert run.answers == decode(packed, tokenizer, PROMPTS, 10, progress=False)


@pytest.mark.long
def test_a_stop_ends_an_answer_and_is_not_in_it(packed, tokenizer):
    (whole,) = decode(packed, tokenizer, PROMPTS[0], 30, progress=False)
    stop = whole.text[5:8]
    (answer,) = decode(packed, tokenizer, PROMPTS[0], 30, Sampling(stop=(stop, "never said")), progress=False)
    assert answer.text == whole.text[: whole.text.index(stop)] and answer.ended == "stop"
    assert len(answer.ids) < len(whole.ids)


@pytest.mark.long
def test_an_iteration_that_is_left_can_go_on(packed, tokenizer):
    whole = decode(packed, tokenizer, PROMPTS, 9, progress=False)
    run = Decoding(packed, tokenizer, PROMPTS, 9)
    for _ in run:
        break
    assert run.answers[0].ended == "interrupted" and len(run.answers[0].ids) < 9
    assert list(run) and run.answers == whole


class Interrupting:
    """Raises KeyboardInterrupt at line `number` of those that run in the files of the infer room that choose tokens."""

    FILES = ("decode.py", "pieces.py", "sampling.py")

    def __init__(self, number: int):
        self.left = number

    def __call__(self, frame, event, _):
        if not frame.f_code.co_filename.endswith(tuple(f"infer/{name}" for name in self.FILES)):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.long
@pytest.mark.parametrize("by", ["steps", "transformers"])
@pytest.mark.filterwarnings("ignore:.*transformers' generate answers")
def test_after_ctrl_c_at_any_line_it_goes_on_to_the_same_answers(by, packed, tokenizer, monkeypatch):
    """Also to the same draws, and to the same end."""
    if by == "transformers":
        ql.add_adapter(packed, "dora", r=2)
        monkeypatch.setattr(
            decoding, "generated", lambda *given: given[-1].extend([40, 50, 60, 70])
        )  # which takes 50 ms
    hot = Sampling(temperature=1.0, repetition_penalty=1.3, seed=5, stop="zz")
    whole = decode(packed, tokenizer, PROMPTS[:2], 4, hot, progress=False)
    interrupted = 0
    # a few lines a token: the largest number is beyond them all; a stride of 11 meets every line at some token
    for number in range(1, 400, 11):
        run = Decoding(packed, tokenizer, PROMPTS[:2], 4, hot)
        before = sys.gettrace()  # that of coverage
        sys.settrace(Interrupting(number))
        try:
            list(run)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # on the line that leaves torch.no_grad() nobody can be safe from Ctrl-C
        list(run)
        assert run.answers == whole, number
    assert interrupted > 10


@pytest.mark.long
def test_ctrl_c_returns_what_was_said(packed, tokenizer, monkeypatch):
    steps = iter(range(100))

    def interrupted(stack, *given):
        if next(steps) == 4:
            raise KeyboardInterrupt
        return step(stack, *given)

    monkeypatch.setattr(decoding, "step_of", lambda stack, in_int8: lambda *given: interrupted(stack, *given))
    answers = decode(packed, tokenizer, PROMPTS, 20, progress=False)
    assert [len(answer.ids) for answer in answers] == [4, 4, 4]
    assert {answer.ended for answer in answers} == {"interrupted"}


@pytest.mark.long
def test_the_base_answers_beside_its_adapter(packed, tokenizer):
    base = decode(packed, tokenizer, PROMPTS, 8, progress=False)
    ql.add_lora(packed, r=2)
    for name, factor in packed.named_parameters():
        if "lora_" in name:
            factor.data = torch.randn(factor.shape, generator=torch.Generator().manual_seed(len(name)))
    tuned = decode(packed, tokenizer, PROMPTS, 8, progress=False)
    run = Decoding(packed, tokenizer, PROMPTS, 8, adapter=False)
    next(iter(run))
    assert decode(packed, tokenizer, PROMPTS, 8, progress=False) == tuned  # the adapter is there between two pieces
    assert list(run) and run.answers == base != tuned
    dora = ql.add_adapter(quantize_linears(small()), "dora", r=2)
    run = Decoding(dora, tokenizer, PROMPTS, 8, adapter=False)
    assert list(run) and run.answers == base  # the base is computed here, whatever stands beside it
    with pytest.raises(ValueError, match="this model has no adapter"):
        list(Decoding(ql.remove_adapter(packed), tokenizer, PROMPTS, 8, adapter=False))


@pytest.mark.long
@pytest.mark.parametrize("method", ["rslora", "pissa", "loftq", "houlsby", "prefix", "zero_bias"])
def test_the_base_answers_beside_any_adapter(method, packed, tokenizer, tmp_path):
    """PiSSA and LoftQ keep the base's bits here, so that their base is the original."""
    base = decode(packed, tokenizer, PROMPTS, 6, progress=False)
    small().save_pretrained(tmp_path)
    model = ql.add_adapter(packed, method, **({"source": tmp_path} if method == "loftq" else {}))
    for number, tensor in enumerate(learned(model).values()):
        tensor.data += 0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    run = Decoding(model, tokenizer, PROMPTS, 6, adapter=False)
    assert list(run) and run.answers == base
    if method in ("rslora", "pissa", "loftq"):  # others go through transformers, and say so
        assert decode(model, tokenizer, PROMPTS, 6, progress=False) != base


@pytest.mark.long
def test_a_full_context_says_so(packed, tokenizer):
    prompt = list(range(3, 63))  # 60 tokens of 64
    (answer,) = decode(packed, tokenizer, [prompt], 20, progress=False)
    assert answer.ended == "context" and len(answer.ids) == 5  # the last is said, and never read
    assert answer.ids == generated(dequantised(packed), prompt, 5)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[5] * 3, [5] * 65], {}, "prompt 1 has 65 tokens, but the context of this model is 64: shorten it"),
        ([[]], {}, "prompt 0 has no token"),
        ([], {}, "prompts=.. is not allowed"),
        (7, {}, "prompts=7 is not allowed"),
        ([[1.5]], {}, "prompt 0 is .1.5., but it must be a text, or a list of whole numbers"),
        ([[5], torch.tensor([5, 6])], {}, r"prompt 1 is tensor.*\.tolist"),
        ([5, 6, 7], {}, "prompt 0 is 5, but it must be"),
        ([None], {}, "prompt 0 is None, but it must be"),
        ([b"the sum"], {}, "prompt 0 is b'the sum', but it must be"),
        ([iter([5])], {}, "prompt 0 is <list_iterator"),
        (["a", "\ud800"], {}, "prompt 1 holds .*half of a surrogate pair"),
        ([[280]], {}, "has id 280, but the embedding has 280 rows"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens=0 is not allowed"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompts, options, message, packed, tokenizer):
    with pytest.raises(ValueError, match=message):
        decode(packed, tokenizer, prompts, progress=False, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1}, "temperature=-1 is not allowed: it is 0, for the likeliest token, or from 0.01 to 100"),
        ({"temperature": 1e-9}, "temperature=1e-09 is not allowed"),
        ({"top_p": 0}, "top_p=0 is not allowed: it is above 0 and at most 1"),
        ({"top_p": 0.9}, "top_p=0.9 needs draws, but temperature is 0"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan is not allowed"),
        ({"repetition_penalty": 101}, "repetition_penalty=101 is not allowed: it is from 0.01 to 100"),
        ({"stop": ("a", "")}, "none of them empty"),
        ({"stop": None}, "stop=None is not allowed"),
        ({"stop": iter(["a"])}, "stop=<list_iterator"),  # it would be used up by the check
        ({"stop": b"a"}, "stop=b'a' is not allowed"),
        ({"stop": ("a", "\ud800")}, "a stop holds .*half of a surrogate pair"),
        ({"seed": -1}, "seed=-1 is not allowed"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_sampling_of_another_type_is_refused(packed, tokenizer):
    for door in (Chat, lambda *pair, **more: Decoding(*pair, "a", **more)):
        with pytest.raises(TypeError, match="sampling={'seed': 3} is not allowed: give a qlora_lab.Sampling"):
            door(packed, tokenizer, sampling={"seed": 3})


def test_stops_that_are_a_list_cannot_change_later():
    stops = ["a", "b"]
    sampling = Sampling(stop=stops)
    stops.append("c")
    assert sampling.stops == ("a", "b") and sampling == Sampling(stop=("a", "b")) and hash(sampling)


@pytest.mark.long
def test_answers_are_those_of_their_moment(packed, tokenizer):
    run = Decoding(packed, tokenizer, PROMPTS[0], 6)
    pieces = iter(run)
    next(pieces)
    (early,) = run.answers
    text = tokenizer.decode(early.ids)
    list(pieces)
    assert tokenizer.decode(early.ids) == text and len(run.answers[0].ids) == 6


@pytest.mark.long
def test_rows_that_have_ended_are_not_computed_again(packed, tokenizer, monkeypatch):
    read = []
    real = decoding.read_prompt
    monkeypatch.setattr(decoding, "read_prompt", lambda *given: (read.append(given[3]), real(*given)))
    run = Decoding(packed, tokenizer, PROMPTS, 4)
    list(run)
    assert list(run) == [] and read == [0, 1, 2]
    with pytest.warns(UserWarning, match="transformers"):  # a whole answer a row
        run = Decoding(ql.add_adapter(packed, "dora", r=2), tokenizer, PROMPTS, 4)
        next(iter(run))
    first = run.answers[0]
    monkeypatch.setattr(decoding, "generated", lambda *given: given[-1].extend([7] * 4))  # what is computed from now on
    with pytest.warns(UserWarning, match="transformers"):
        assert list(run)
    assert run.answers[0] == first and [a.ids for a in run.answers[1:]] == [[7] * 4] * 2


@pytest.mark.long
def test_virtual_tokens_take_places_of_the_context(tokenizer):
    model = ql.add_adapter(small(), "prompt", virtual_tokens=20)
    with pytest.warns(UserWarning, match="transformers"):
        (answer,) = decode(model, tokenizer, [[7] * 40], 30, progress=False)
    assert answer.ended == "context" and len(answer.ids) == 5  # 20 + 40 + 4 places, and one that is never read
    with pytest.raises(ValueError, match="has 45 tokens, but the context of this model is 64, and 20 virtual tokens"):
        Decoding(model, tokenizer, [[7] * 45])
    Decoding(model, tokenizer, [[7] * 64], adapter=False)  # the base has none


def test_a_nan_names_its_layer(tokenizer):
    model = small()
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = torch.nan
    for prompt in ("a", "the sum of"):  # in the step, and in the prompt before it
        with pytest.raises(FloatingPointError, match="layer 1 of 2 computes a number that is not finite"):
            decode(model, tokenizer, prompt, progress=False)
    for part in ("q_proj", "k_proj"):  # of one key, softmax would make it a finite number
        model = small()
        getattr(model.model.layers[1].self_attn, part).weight.data[3, 3] = torch.nan
        with pytest.raises(FloatingPointError, match="layer 1 of 2 computes a number that is not finite"):
            decode(model, tokenizer, [[5]], 1, progress=False)
    model = small()
    model.lm_head.weight.data[3, 3] = torch.inf
    with pytest.raises(FloatingPointError, match="the head, or the norm in front of it"):
        decode(model, tokenizer, "a", progress=False)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_nan_is_told_by_other_families_as_well(tokenizer, temperature, wrong):
    model = small(config=GemmaConfig, head_dim=64)
    model.model.norm.weight.data[3] = wrong
    with pytest.warns(UserWarning, match="transformers"), pytest.raises(FloatingPointError, match="not a finite"):
        decode(model, tokenizer, "a", 3, Sampling(temperature=temperature), progress=False)


@pytest.mark.long
def test_other_families_go_through_transformers_and_say_so(tokenizer):
    model = small(config=GemmaConfig, head_dim=64)
    with pytest.warns(UserWarning, match=r"not of llama, mistral, qwen2: transformers' generate answers"):
        answers = decode(model, tokenizer, PROMPTS, 6, progress=False)
    assert [a.ids for a in answers] == [generated(model, tokenizer(p)["input_ids"], 6) for p in PROMPTS]
    assert {answer.ended for answer in answers} == {"length"}
    with pytest.warns(UserWarning, match="transformers"):
        (answer,) = decode(model, tokenizer, [[7] * 62], 6, progress=False)
    assert answer.ended == "context" and len(answer.ids) == 3
    stop = answers[0].text[2:4]
    with pytest.warns(UserWarning, match="transformers"):
        (answer,) = decode(model, tokenizer, PROMPTS[0], 6, Sampling(temperature=0.01, stop=stop), progress=False)
    assert answer.text == answers[0].text[: answers[0].text.index(stop)] and answer.ended == "stop"
    with pytest.warns(UserWarning, match="transformers"):  # the largest seed, and a row after it
        assert decode(model, tokenizer, PROMPTS, 2, Sampling(temperature=1, seed=2**63 - 1), progress=False)[1].ids


def test_a_signal_that_ends_the_process_passes_through(packed, tokenizer, monkeypatch):
    for interrupt, passed in ((KeyboardInterrupt, False), (Terminated, True)):

        def choose(*given, interrupt=interrupt):
            raise interrupt

        monkeypatch.setattr(Chooser, "choose", choose)
        with pytest.raises(Terminated) if passed else nullcontext():
            assert decode(packed, tokenizer, "a", 3, progress=False)[0].ended == "interrupted"


@pytest.mark.long
def test_transformers_stops_where_a_stop_is_said_and_ctrl_c_keeps_the_text(tokenizer, monkeypatch):
    model = small(config=GemmaConfig, head_dim=64)
    passes = []
    model.register_forward_hook(lambda *given: passes.append(1))
    with pytest.warns(UserWarning, match="transformers"):
        (whole,) = decode(model, tokenizer, "a", 30, progress=False)
    stop = whole.text[3:5]
    passes.clear()
    with pytest.warns(UserWarning, match="transformers"):
        (stopped,) = decode(model, tokenizer, "a", 30, Sampling(stop=stop), progress=False)
    assert stopped.ended == "stop" and len(passes) == len(stopped.ids) < 30
    passes.clear()

    def press(*given):
        if len(passes) == 4:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(press)
    with pytest.warns(UserWarning, match="transformers"):
        (begun,) = decode(model, tokenizer, "a", 30, progress=False)
    assert (begun.ids, begun.ended) == (whole.ids[:4], "interrupted") and whole.text.startswith(begun.text) != ""


@pytest.mark.parametrize("quantised", [True, False])
def test_no_kernel_runs_where_kernels_are_switched_off(request, quantised, monkeypatch, with_kernels):
    stack = read_stack(quantize_linears(small()) if quantised else small())
    monkeypatch.undo()  # of readable_only
    monkeypatch.setenv("QLORA_LAB_KERNELS", "reference")
    assert not fast.can_step(stack)
    monkeypatch.delenv("QLORA_LAB_KERNELS")
    assert fast.can_step(stack) == cpu.FAST


@pytest.mark.long
def test_threads_that_ask_the_base_do_not_disturb_others(packed, tokenizer):
    """The base is asked without its adapter, which is taken out of the model that the other thread reads."""
    model = ql.add_lora(packed, 2)
    for adapter in adapters(model).values():
        adapter.lora_B.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    tuned, base = (list(Decoding(model, tokenizer, "a", 2, adapter=a)) for a in (True, False))
    assert tuned != base
    ends = threading.Event()

    def ask_the_base():
        while not ends.is_set():
            assert list(Decoding(model, tokenizer, "a", 2, adapter=False)) == base

    other = threading.Thread(target=ask_the_base)
    other.start()
    try:
        assert all(list(Decoding(model, tokenizer, "a", 2)) == tuned for _ in range(40))
    finally:
        ends.set()
        other.join()


# ------------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.long
def test_one_seed_one_text(packed, tokenizer):
    hot = Sampling(temperature=1.5, seed=3)
    first, again = (decode(packed, tokenizer, PROMPTS, 12, hot, progress=False) for _ in range(2))
    assert first == again
    other = decode(packed, tokenizer, PROMPTS, 12, Sampling(temperature=1.5, seed=99), progress=False)
    assert [a.ids for a in first] != [a.ids for a in other]
    alone = decode(packed, tokenizer, PROMPTS[0], 12, hot, progress=False)
    assert alone[0].ids == first[0].ids  # whatever stands beside it


def test_the_smallest_top_p_leaves_the_likeliest():
    shares = torch.tensor([0.2, 0.5, 0.3])
    assert kept(shares, 1e-300).tolist() == [0, 0.5, 0]  # 0 in float32
    even = torch.full((4096,), 2.0**-12)  # more than the thousand among which it looks first; all sums are exact
    assert kept(even, 0.5).count_nonzero() == 2048


def test_a_chooser_does_what_transformers_do():
    """Repetition penalty over prompt and answer, then temperature, then top-p, then a draw with the row's own seed."""
    torch.manual_seed(0)
    logits, prompt, said = 4 * torch.randn(50), [3, 4, 5], [6, 7]
    logits[[3, 6]] = logits.max() + 1  # the penalty decides
    sampling = Sampling(temperature=0.7, top_p=0.6, repetition_penalty=1.8, seed=11)
    ids = torch.tensor([prompt + said])
    warped = RepetitionPenaltyLogitsProcessor(1.8)(ids, logits[None].clone())
    warped = TopPLogitsWarper(0.6)(ids, TemperatureLogitsWarper(0.7)(ids, warped))
    for row in range(8):
        expected = torch.multinomial(warped.softmax(-1)[0], 1, generator=torch.Generator().manual_seed(11 + row))
        assert Chooser(sampling, prompt, row).choose(logits, said) == int(expected)
    draws = {Chooser(sampling, prompt, row).choose(logits, said) for row in range(64)}
    assert draws == set(warped[0].isfinite().nonzero().flatten().tolist())  # and no other: nearly certain for 64 draws


logits = st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5).map(torch.tensor)


@pytest.mark.long
@given(logits, st.lists(st.integers(0, 4), min_size=1, max_size=6), st.floats(0.5, 2), st.floats(0.01, 1))
def test_options_mean_what_they_mean_in_transformers(logits, seen, penalty, top_p):
    ids = torch.tensor([seen])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None].clone())
    assert torch.equal(penalised(logits, sorted(set(seen)), penalty), expected[0])
    cut = TopPLogitsWarper(top_p)(ids, TemperatureLogitsWarper(0.5)(ids, logits[None]))[0]
    shares = torch.softmax(logits / 0.5, 0)
    ours = kept(shares, top_p)
    # sums of shares within a rounding of top_p may fall on either side of it
    sums = shares.sort(descending=True).values.cumsum(0)
    if (sums - top_p).abs().min() > 1e-6 and len(shares.unique()) == 5:
        assert torch.equal(ours > 0, (cut > -math.inf) & (shares > 0))
    assert ours.max() == shares.max()


@pytest.mark.long
def test_draws_have_the_shares_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -50.0])
    chooser = Chooser(Sampling(temperature=2.0), [])
    drawn = torch.tensor([chooser.choose(logits, [0] * place) for place in range(4000)]).bincount(minlength=4) / 4000
    # four standard deviations of a share of at most 1/2
    assert (drawn - torch.softmax(logits / 2, 0)).abs().max() < 4 * 0.5 / 4000**0.5


# --------------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.long
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_no_piece_cuts_a_character(byte_tokenizer, text):
    """Every byte is a token here, so a character comes in up to four tokens."""
    ids = byte_tokenizer(text)["input_ids"]
    pieces = Pieces(byte_tokenizer)
    parts = [pieces.add(token) for token in ids] + [pieces.rest(cut=False)]
    assert "".join(parts) == text


@pytest.mark.long
@given(st.text("ab", max_size=10), st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_is_found_wherever_it_begins(byte_tokenizer, text, stops):
    pieces = Pieces(byte_tokenizer, stops)
    said = ""
    for token in byte_tokenizer(text)["input_ids"]:
        said += pieces.add(token)
        if pieces.stopped:
            break
    said += pieces.rest(cut=True)
    first = [next((end for end in range(len(text) + 1) if text[:end].endswith(stop)), None) for stop in stops]
    ends = [end for end in first if end is not None]
    assert pieces.stopped == bool(ends)
    # the answer ends where the stop that is complete first begins
    starts = [e - len(s) for e, s in zip(first, stops, strict=True) if e is not None and e == min(ends)]
    assert said == (text if not ends else text[: min(starts)])


@pytest.mark.parametrize("cut, text", [(False, HALF), (True, "")])
def test_half_a_character_is_told_where_the_model_ends_in_it(byte_tokenizer, cut, text):
    pieces = Pieces(byte_tokenizer)
    first = byte_tokenizer("é")["input_ids"][0]
    assert (pieces.add(first), pieces.rest(cut)) == ("", text)


def test_an_answer_that_is_cut_does_not_end_in_half_a_character(packed, byte_tokenizer, monkeypatch):
    ids = byte_tokenizer("Hi 😀😀")["input_ids"]  # 4 bytes each, a token a byte
    said = iter(ids)
    monkeypatch.setattr(Chooser, "choose", lambda *given: next(said))
    (answer,) = decode(packed, byte_tokenizer, "a", len(ids) - 2, progress=False)
    assert (answer.text, answer.ids, answer.ended) == ("Hi 😀", ids[:-2], "length")


@pytest.mark.parametrize("bytes_said", [1, 2, 3])
def test_nor_with_a_tokenizer_that_writes_each_byte(bytes_said):
    """ByteFallback, as in LLaMA's tokenizer, decodes each byte of an unfinished character to a sign of its own."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "a", *(f"<0x{byte:02X}>" for byte in "😀".encode())]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces = Pieces(PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>"))
    said = [1, 2, 3, 4, 5, *range(2, 2 + bytes_said)]
    assert "".join(pieces.add(token) for token in said) + pieces.rest(cut=True) == "a😀"


@pytest.fixture(scope="module")
def sentence_tokenizer():
    """As sentencepiece's: a word begins with its space, and decoding strips the first space of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "\u2581Paris", "\u2581is", "\u2581big"]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Metaspace()
    plain.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", eos_token="</s>")


def test_no_space_is_lost(sentence_tokenizer):
    """Neither behind a special token in an answer, nor between a text and what continues it."""
    pieces = Pieces(sentence_tokenizer)
    assert (
        "".join(pieces.add(token) for token in (2, 1, 3, 4)) == sentence_tokenizer.decode([2, 3, 4]) == "Paris is big"
    )
    following = Pieces(sentence_tokenizer, before=2)
    assert "Paris" + "".join(following.add(token) for token in (3, 4)) == "Paris is big"


def test_a_prompt_that_ends_in_half_a_character_loses_nothing(byte_tokenizer):
    first, *others = byte_tokenizer("éa")["input_ids"]
    pieces = Pieces(byte_tokenizer, before=first)
    assert "".join(pieces.add(token) for token in others).endswith("a")


@pytest.fixture(scope="module")
def byte_tokenizer():
    from tests.conftest import _tokenizer

    return _tokenizer()


# ----------------------------------------------------------------------------------------------------------------- real


@pytest.mark.slow
def test_the_default_model_says_what_transformers_says(record_property):
    """Six of the prompts of bench/decode_equal.py; all fifty are in its JSON."""
    found = decode_equal.compare(decode_equal.PROMPTS[::9], 48, windows=1)
    record_property("parted", found["parted"])
    assert found["kernel"] == cpu.FAST and found["prompts"] == 6
    assert all(abs(row["gap"]) < decode_equal.TIE for row in found["parted"]), found["parted"]
    assert found["perplexity"]["relative"] < 1e-4
