"""Ask a model, with or without an adapter."""

import argparse
import json
from pathlib import Path

import qlora_lab as ql
from qlora_lab.cli.loading import add_model, load_model
from qlora_lab.cli.options import common, whole

EXAMPLE = 'qlora-lab generate "What is the capital of France?" --adapter runs/first/adapter'
LESS_MEMORY = "use fewer --max-new-tokens, or pass the copy from `qlora-lab quantize` as --model"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "question", type=str, help="your question, before any options; the model's chat template is added"
    )
    model = parser.add_argument_group("model")
    add_model(model)
    model.add_argument("--adapter", metavar="FOLDER", help="an adapter in PEFT's format")
    place = "a picture that stands where the question has <image>; once for each"
    model.add_argument("--picture", metavar="FILE", action="append", default=[], dest="pictures", help=place)
    output = parser.add_argument_group("output")
    most = "maximum number of tokens in the answer"
    output.add_argument("--max-new-tokens", type=whole, default=128, metavar="N", help=most)
    common(output)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.quant.numbers import check_whole
    from qlora_lab.train.run_folder import find_adapter

    check_whole("max-new-tokens", a.max_new_tokens)
    if a.adapter:  # a missing adapter should not cost the minute that a model takes
        find_adapter(Path(a.adapter))
    model, tokenizer = load_model(a)  # the base; an adapter is added in place
    if a.adapter is not None:  # "" is a mistake, such as a shell variable that is not set
        ql.load_adapter(model, a.adapter)
    options = {"pictures": a.pictures, "progress": not a.quiet}
    answer = ql.generate(model, tokenizer, a.question, a.max_new_tokens, **options)
    print(json.dumps({"question": a.question, "answer": answer}) if a.json else answer)
