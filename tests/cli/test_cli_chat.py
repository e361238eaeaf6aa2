"""`generate` and `chat`: text while it comes, what Ctrl-C leaves, and a conversation by lines or in a terminal."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.cli import chat as command
from qlora_lab.cli.answering import tidy
from qlora_lab.infer import decode as decoding
from qlora_lab.infer.stack import narrow_head
from qlora_lab.infer.step import step
from qlora_lab.kernels import product
from qlora_lab.model.load import load
from tests.cli.test_cli_quiet import adapter

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*are in 4 bits;")]
ASKED = "<|im_start|>user\ndouble 3<|im_end|>\n<|im_start|>assistant\n"
GIVEN = {"generate": (["double 3"], ""), "chat": ([], "double 3\n")}  # command -> words, and lines of stdin
FEW = ["--max-new-tokens", "6", "--quiet"]


@pytest.fixture
def run(monkeypatch, capsys, folder):
    """Runs a command over lines of stdin: exit code, stdout and stderr."""

    def made(name, *words, lines=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        model = [str(folder)] if name == "chat" else ["--model", str(folder)]
        code = cli.main([name, *model, *FEW, *map(str, words)])
        return code, *capsys.readouterr()

    return made


def interrupted_at(monkeypatch, number, sent=signal.SIGINT):
    """A signal arrives in step `number`, counted over all answers."""
    steps = iter(range(10**6))

    def stepped(stack, in_int8):
        def one(*given):
            if next(steps) == number:
                signal.raise_signal(sent)
            return step(stack, *given)

        return one

    monkeypatch.setattr(decoding, "step_of", stepped)


def learned(folder, tmp_path) -> Path:
    """An adapter that changes what the model says."""
    from qlora_lab.adapters.adapter import learned as tensors

    model = ql.add_lora(ql.load(folder, progress=False)[0], r=2)
    for number, parameter in enumerate(tensors(model).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return ql.save_adapter(model, tmp_path / "learned")


def test_a_piped_answer_is_the_one_of_the_library(run, folder):
    model, tokenizer = ql.load(folder, progress=False)
    (want,) = ql.decode(model, tokenizer, ASKED, 6, progress=False)
    code, out, err = run("generate", "double 3")
    assert (code, err) == (0, "") and out == "".join(tidy([want.text])) + "\n"
    said = json.loads(run("generate", "double 3", "--json")[1])
    assert said == {"question": "double 3", "answer": want.text.strip(), "ended": "length"}


def stored_as(folder, dtype):
    """The model in `folder` in another dtype."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(folder)


def head_of(run, monkeypatch, name, *words):
    """What a command answers, and the dtype of its model's head while it does, where float32 products are faster."""
    product.keep(product.Race.won_by("float32"))
    models = []
    monkeypatch.setattr(ql, "load", lambda *given, **options: models.append(load(*given, **options)) or models[-1])
    asked, lines = GIVEN[name]
    answer = json.loads(run(name, *asked, *words, "--json", lines=lines)[1])["answer"]
    return answer, models[0][0].get_output_embeddings().weight.dtype


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_a_head_of_bf16_stays_in_bf16(run, folder, monkeypatch, name):
    """Where float32 products are faster, too: an answer computes in float32 anyway, and reads half as much."""
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    asked, dtype = head_of(run, monkeypatch, name, "--dtype", "float32")
    assert dtype == torch.float32  # as it was asked for
    assert head_of(run, monkeypatch, name) == (asked, torch.bfloat16)


def test_a_head_that_bf16_would_round_stays_in_float32(run, monkeypatch):
    assert head_of(run, monkeypatch, "generate")[1] == torch.float32


def test_a_model_that_transformers_answers_for_keeps_its_dtype(tiny_llama):
    tiny_llama.to(torch.bfloat16).float().model.register_forward_hook(lambda *given: None)
    narrow_head(tiny_llama)
    assert tiny_llama.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_options_reach_the_answer(run, folder, name):
    model, tokenizer = ql.load(folder, progress=False)
    sampling = ql.Sampling(temperature=3, top_p=0.9, repetition_penalty=1.5, seed=5)
    (want,) = ql.decode(model, tokenizer, ASKED, 6, sampling, progress=False)
    hot = ["--temperature", "3", "--top-p", "0.9", "--repetition-penalty", "1.5", "--seed", "5", "--json"]
    words, lines = GIVEN[name]
    assert json.loads(run(name, *words, *hot, lines=lines)[1])["answer"] == want.text.strip()


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_a_failed_answer_is_not_printed(run, monkeypatch, name):
    def broken(*given):
        raise FloatingPointError("layer 0 of 2 computes a number that is not finite")

    monkeypatch.setattr(decoding, "step_of", lambda stack, in_int8: broken)
    words, lines = GIVEN[name]
    code, out, err = run(name, *words, "--json", lines=lines)
    assert (code, out) == (2, "") and "layer 0 of 2" in err


def test_one_seed_one_text(run):
    hot = ["--temperature", "3", "--top-p", "0.99", "--repetition-penalty", "1.2"]
    first, again, other = (run("generate", "double 3", *hot, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_a_stop_is_not_printed(run):
    whole = json.loads(run("generate", "double 3", "--json")[1])["answer"]
    said = json.loads(run("generate", "double 3", "--json", "--stop", "never said", "--stop", whole[2])[1])
    assert said["answer"] == whole[: whole.index(whole[2])].strip() and said["ended"] == "stop"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["--top-p", "0"], "top_p=0.0 is not allowed"),
        (["--top-p", "0.5"], "top_p=0.5 needs draws, but temperature is 0"),
        (["--stop", ""], "none of them empty"),
        (["--stop", "\udce9"], "a stop holds .*half of a surrogate pair"),
        (["--picture", "cat.png", "--seed", "3"], "leave out the options that draw, stop or take fewer bits"),
        (["--cache-bits", "16"], "cache_bits=16 is not allowed: it is 32 or 8"),
        (["--picture", "cat.png", "--cache-bits", "8"], "leave out the options that draw, stop or take fewer bits"),
        (["--picture", "cat.png", "--int8"], "leave out the options that draw, stop or take fewer bits"),
    ],
)
def test_options_that_are_not_allowed_cost_no_loading(run, monkeypatch, words, message):
    monkeypatch.setattr(ql, "load", None)
    code, out, err = run("generate", "double 3", *words)
    assert (code, out) == (2, "") and re.search(message, err) and err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_ctrl_c_leaves_what_was_said(run, monkeypatch, words):
    whole = run("generate", "double 3", *words)[1]
    interrupted_at(monkeypatch, 3)
    code, out, err = run("generate", "double 3", *words)
    assert (code, err) == (130, "qlora-lab generate: interrupted\n")
    if words:
        said, all_of_it = json.loads(out), json.loads(whole)
        assert said["ended"] == "interrupted" and all_of_it["answer"].startswith(said["answer"]) and said["answer"]
    else:
        assert whole.startswith(out[:-1]) and 1 < len(out) < len(whole)


def test_half_a_character_costs_no_loading(run, monkeypatch):
    monkeypatch.setattr(ql, "load", None)
    code, out, err = run("generate", "caf\udce9")
    assert (code, out) == (2, "") and "the question holds '\\udce9', half of a surrogate pair" in err


class Left(io.StringIO):
    """A pipe whose reader has gone after the first word."""

    def write(self, text):
        if self.tell():
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("words", [("generate", "double 3"), ("chat",), ("chat", "--json")])
def test_a_reader_who_has_gone_costs_no_more_answers(run, monkeypatch, words):
    steps = []

    def counted(stack, in_int8):
        return lambda *given: (steps.append(1), step(stack, *given))[1]

    monkeypatch.setattr(decoding, "step_of", counted)
    monkeypatch.setattr(sys, "stdout", Left())
    code, _, err = run(*words, "--max-new-tokens", "30", lines="double 3\n" * 20)
    assert code == 2 and err.endswith("the result could not be printed (Broken pipe)\n")
    assert len(steps) < (61 if "--json" in words else 30)  # a line of JSON is an answer: the second has no reader


def test_control_characters_are_spelled():
    assert "".join(tidy(["\x1b", "]0;title\x07", "\x9b2J\r", "\n"])) == r"\x1b]0;title\x07\x9b2J"
    assert "".join(tidy(["\n ", " a", "\n", "\n", "\tb \n", " "])) == "a\n\n\tb"


# ----------------------------------------------------------------------------------------------------------------- chat


def replies(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_conversation_is_remembered_until_it_is_reset(run, folder):
    lines = "double 3\n\ndouble 3\n/reset\ndouble 3\n/exit\nnever asked\n"
    code, out, err = run("chat", "--json", lines=lines)
    first, second, third = replies(out)
    assert (code, err) == (0, "")
    assert first["answer"] == third["answer"] != second["answer"] and first["tokens"] == 6
    model, tokenizer = ql.load(folder, progress=False)
    turns = "<|im_start|>user\ndouble 3<|im_end|>\n<|im_start|>assistant\n"
    (said,) = ql.decode(model, tokenizer, turns, 6)
    (want,) = ql.decode(model, tokenizer, f"{turns}{said.text}<|im_end|>\n{turns}", 6)
    assert second["answer"] == want.text.strip()


def test_the_base_answers_first_and_then_the_adapter(run, folder, tmp_path):
    tuned = learned(folder, tmp_path)
    lines = "double 3\ndouble 4\n"
    alone = [run("chat", "--json", *more, lines=lines)[1] for more in ([], ["--adapter", tuned])]
    both = replies(run("chat", "--json", "--adapter", tuned, "--compare", lines=lines)[1])
    assert [reply["who"] for reply in both] == ["base", "adapter"] * 2
    for who, out in zip(("base", "adapter"), alone, strict=True):  # each goes on with its own answers
        answers = [reply["answer"] for reply in replies(out)]
        assert answers == [reply["answer"] for reply in both if reply["who"] == who]
    assert both[0]["answer"] != both[1]["answer"]
    code, out, _ = run("chat", "--adapter", adapter(folder, tmp_path), "--compare", lines="double 3\n")
    base, same = out.splitlines()[0], out.split("adapter: ")[1]  # an adapter that was just begun changes nothing
    assert code == 0 and out == f"base: {same}adapter: {same}" and base.startswith("base: ")


def test_nothing_to_compare_with_is_a_mistake(run):
    code, out, err = run("chat", "--compare")
    assert (code, out) == (2, "") and err.endswith("nothing to compare the base with: add --adapter FOLDER\n")


def test_a_full_context_names_both_numbers(run, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    code, out, err = run("chat", "--json", "--max-new-tokens", 60, lines="double 3\ndouble 4\n")
    assert code == 2 and replies(out)[0]["ended"] == "context"
    assert re.search(r"the conversation has \d+ tokens, but the context of this model is 40: reset the conv", err)


class Person:
    """A terminal: each answer of `input` is a line, or an exception that is raised."""

    def __init__(self, monkeypatch, *lines):
        monkeypatch.setattr(command, "_is_terminal", lambda: True)
        left = iter(lines)

        def asked(prompt):
            line = next(left, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", asked)


def test_in_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(run, monkeypatch):
    Person(monkeypatch, "double 3", "double 3")
    interrupted_at(monkeypatch, 3)
    code, out, _ = run("chat", "--json")
    first, second = replies(out.rstrip("\n"))
    assert code == 0 and first["ended"] == "interrupted" and first["tokens"] == 3
    assert second["ended"] in ("end", "length")  # it goes on


def test_sigterm_ends_the_whole_chat(run, monkeypatch):
    Person(monkeypatch, "double 3", "double 3")
    interrupted_at(monkeypatch, 3, signal.SIGTERM)
    code, out, err = run("chat", "--json")
    assert (code, out, err) == (130, "", "qlora-lab chat: interrupted\n")


def test_in_a_terminal_a_refused_question_is_followed_by_another(run, monkeypatch):
    Person(monkeypatch, "half \udce9", "double 3")
    code, out, err = run("chat", "--json")
    assert code == 0 and len(replies(out.rstrip("\n"))) == 1 and "half of a surrogate pair" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_true_terminal(folder):
    """A real one: the prompt, an answer, its speed, and Ctrl-D."""
    import pty

    main, side = pty.openpty()
    words = [sys.executable, "-m", "qlora_lab.cli", "chat", str(folder), "--max-new-tokens", "4"]
    with subprocess.Popen(words, stdin=side, stdout=side, stderr=side) as child:
        os.close(side)

        rest = b""

        def until(text: bytes) -> bytes:
            nonlocal rest
            while text not in rest:
                rest += os.read(main, 4096)
            said, _, rest = rest.partition(text)
            return said

        assert command.KEYS.encode() in until(b"> ")
        os.write(main, b"double 3\n")
        until(b"first words after")
        until(b"> ")  # readline does not see a Ctrl-D that comes before it has set the terminal up
        os.write(main, b"\x04")
        assert child.wait(60) == 0
    os.close(main)
