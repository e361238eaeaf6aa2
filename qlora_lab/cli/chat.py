"""Talk with a model, with or without an adapter."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

from qlora_lab.cli.answering import (
    LESS_MEMORY as LESS_MEMORY,
    add_adapter,
    add_answer,
    load_with_adapter,
    print_pieces,
    sampling_of,
    unheard,
)
from qlora_lab.cli.loading import add_measured, add_quantization, print_note
from qlora_lab.cli.options import add_fields, common, one_line
from qlora_lab.train.run_options import ModelOptions

EXAMPLE = "qlora-lab chat smollm2-135m --adapter runs/first/adapter --compare"
KEYS = "/reset begins a new conversation; Ctrl-C ends an answer; /exit or Ctrl-D ends the chat"
ENDINGS = {  # what is worth saying
    "length": "cut at --max-new-tokens",
    "context": "the context is full: /reset begins a new conversation",
    "interrupted": "interrupted; the conversation goes on",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    model = add_measured(parser)
    add_quantization(model)
    add_fields(model, ModelOptions, "also", "dtype")
    add_adapter(model)
    model.add_argument("--compare", action="store_true", help="let the base answer first, then the adapter")
    output = parser.add_argument_group("output")
    add_answer(output, 512)
    common(output)


def run(a: argparse.Namespace) -> None:
    """Answer one line after the other: of a terminal, or of whatever stdin is."""
    # before the model: a mistake should not cost the minute that it takes
    if a.compare and a.adapter is None:
        raise ValueError("nothing to compare the base with: add --adapter FOLDER")
    from qlora_lab.infer.chat import Chat  # loads torch
    from qlora_lab.quant.numbers import check_whole

    check_whole("max-new-tokens", a.max_new_tokens)
    sampling = sampling_of(a)
    model, tokenizer = load_with_adapter(a)
    # both read the same packed weights: the second conversation costs its own keys and values alone
    names = {"base": False, "adapter": True} if a.compare else {"": True}
    chats = {n: Chat(model, tokenizer, a.max_new_tokens, sampling, adapter=adapter) for n, adapter in names.items()}
    terminal = _is_terminal()
    if terminal:
        print_note(a, KEYS)
    for question in _questions(terminal):
        if question == "/exit":
            return
        if question == "/reset":
            for chat in chats.values():
                chat.reset()
            print_note(a, "a new conversation")
            continue
        for name, chat in chats.items():
            if not _answer(a, name, chat, question, terminal):
                break
            if unheard():  # a long file of questions would be answered to nobody
                return


def _is_terminal() -> bool:
    """Whether a person sits there who can repeat a question. A stream may be closed."""
    with suppress(AttributeError, ValueError):
        return sys.stdin.isatty() and sys.stdout.isatty()
    return False


def _questions(terminal: bool) -> Iterator[str]:
    """Yield lines that are not empty, until the input ends."""
    if terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - with it, `input` has arrow keys and the lines before
    while True:
        if terminal:
            try:
                line = input("> ")
            except EOFError:  # Ctrl-D
                print()
                return
        # a process may have no stdin at all
        elif not (line := sys.stdin.readline() if sys.stdin else ""):
            return
        if line.strip():
            yield line.strip()


def _answer(a: argparse.Namespace, name: str, chat, question: str, terminal: bool) -> bool:
    """Print an answer and its speed. Returns whether it came to its end.

    In a terminal, Ctrl-C ends only the answer, and a question that is refused, such as one that no longer fits into the
    context, can be followed by another. From a pipe nobody would react, so there both end the command.
    """
    from qlora_lab.train.interrupt import Terminated

    whole = True
    try:
        with closing(chat.ask(question)) as pieces:
            if a.json:  # a line is printed once it is whole
                for _ in pieces:
                    pass
            else:
                if name:
                    print(f"{name}: ", end="")
                print_pieces(pieces)
    except (ValueError, FloatingPointError) as error:
        if not terminal:
            raise
        print(f"qlora-lab chat: {one_line(str(error))}", file=sys.stderr)
        return False
    except KeyboardInterrupt as interrupt:
        if not terminal or isinstance(interrupt, Terminated):
            raise
        whole = False  # nor does the adapter answer: if you stop the base, you do not want to wait for the other
    if chat.reply is not None:  # an interrupt can come before the first token
        _report(a, name, question, chat.reply)
    return whole


def _report(a: argparse.Namespace, name: str, question: str, reply) -> None:
    if a.json:
        who = {"who": name} if name else {}
        figures = {"ended": reply.ended, "tokens": reply.tokens, "tokens_per_second": reply.rate}
        print(json.dumps({"question": question, **who, "answer": reply.text.strip(), **figures}), flush=True)
        return
    notes = reply.speed, f"first words after {reply.wait:.1f} s", ENDINGS.get(reply.ended)
    print_note(a, f"[{'; '.join(filter(None, notes))}]")
