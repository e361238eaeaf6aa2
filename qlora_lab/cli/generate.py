"""Ask a model, with or without an adapter."""

import argparse
import json
from collections import deque

import qlora_lab as ql
from qlora_lab.cli.answering import (
    LESS_MEMORY as LESS_MEMORY,
    add_adapter,
    add_answer,
    load_with_adapter,
    print_pieces,
    sampling_of,
    tidy,
)
from qlora_lab.cli.loading import add_model
from qlora_lab.cli.options import common

EXAMPLE = 'qlora-lab generate "What is the capital of France?" --adapter runs/first/adapter'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "question", type=str, help="your question, before any options; the model's chat template is added"
    )
    model = parser.add_argument_group("model")
    add_model(model)
    add_adapter(model)
    place = "a picture that stands where the question has <image>; once for each"
    model.add_argument("--picture", metavar="FILE", action="append", default=[], dest="pictures", help=place)
    output = parser.add_argument_group("output")
    add_answer(output, 128)
    common(output)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.data.examples import check_text
    from qlora_lab.infer.sampling import Sampling
    from qlora_lab.quant.numbers import check_whole

    check_text(a.question, "the question")  # half a character, as a shell can pass, before the model is loaded
    check_whole("max-new-tokens", a.max_new_tokens)
    sampling = sampling_of(a)
    if a.pictures and sampling != Sampling():
        only = "about pictures only the likeliest answer is given, by transformers"
        raise ValueError(f"{only}: leave out the options that draw, stop or take fewer bits")
    model, tokenizer = load_with_adapter(a)
    if a.pictures:
        options = {"pictures": a.pictures, "progress": not a.quiet}
        answer = ql.generate(model, tokenizer, a.question, a.max_new_tokens, **options)
        print(json.dumps({"question": a.question, "answer": answer}) if a.json else "".join(tidy([answer])))
        return
    _stream(a, ql.Decoding(model, tokenizer, [_asked(a.question, tokenizer)], a.max_new_tokens, sampling))


def _asked(question: str, tokenizer) -> list[int]:
    from qlora_lab.data.dataset import prompt_of
    from qlora_lab.data.examples import Example

    return prompt_of(Example((("user", question), ("assistant", ""))), tokenizer).ids


def _stream(a: argparse.Namespace, run: "ql.Decoding") -> None:
    """Print the answer while it comes, or as one line of JSON. Ctrl-C leaves what was said on stdout."""
    if not a.json:
        print_pieces(piece.text for piece in run)
        return
    try:
        deque(run, maxlen=0)
    except KeyboardInterrupt:
        _print_json(a, run)
        raise
    _print_json(a, run)


def _print_json(a: argparse.Namespace, run: "ql.Decoding") -> None:
    (answer,) = run.answers
    # json.dumps spells control characters by itself
    print(json.dumps({"question": a.question, "answer": answer.text.strip(), "ended": answer.ended}))
