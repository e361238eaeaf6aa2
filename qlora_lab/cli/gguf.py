"""Write a model as a GGUF file, which llama.cpp and the programs built on it run."""

import argparse

import qlora_lab as ql
from qlora_lab.cli.options import add_field, common
from qlora_lab.cli.printing import report
from qlora_lab.train.run_options import ModelOptions

EXAMPLE = "qlora-lab gguf merged --format q8_0 --out model.gguf"
FORMATS = ("f16", "q8_0", "q4_1", "q4_0")  # of export/gguf_out.py, which imports torch; a test compares


def add_options(parser: argparse.ArgumentParser) -> None:
    add_field(parser, ModelOptions, "model", positional=True)
    output = parser.add_argument_group("output")
    bits = "bits a weight: 16, 8.5, 5, 4.5"
    output.add_argument("--format", choices=FORMATS, default="q8_0", help=f"how weights are stored ({bits})")
    output.add_argument("--out", required=True, metavar="FILE", help="new file for the model")
    common(output)


def run(a: argparse.Namespace) -> None:
    written = ql.to_gguf(a.model, a.out, a.format, progress=not a.quiet)
    figures = {"file": a.out, "format": a.format, "bytes": written.bytes, "tensors": written.tensors}
    report(a, figures | {"relative_error": written.relative_error})
