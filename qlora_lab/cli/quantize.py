"""Write a copy of a model in 4 bits that loads in seconds; if interrupted, run it again to continue."""

import argparse

import qlora_lab as ql
from qlora_lab.cli.loading import add_quantization, print_share
from qlora_lab.cli.options import add_field, add_fields, common
from qlora_lab.cli.printing import report
from qlora_lab.train.run_options import ModelOptions

EXAMPLE = "qlora-lab quantize smollm2-135m --out smollm2-nf4"
LESS_MEMORY = "close other programs, then repeat the command: it continues where it stopped"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_field(parser, ModelOptions, "model", positional=True)
    model = parser.add_argument_group("model")
    add_quantization(model)
    add_fields(model, ModelOptions, "also")
    model.add_argument("--plan", metavar="FILE", help="plan from block-size: data type and block size of each layer")
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="FOLDER", help="folder for the copy; pass it on as --model")
    common(output)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.model.quantized_folder import folder_in_4_bits, read_by
    from qlora_lab.quant.codebook import CODEBOOKS

    if a.codebook == "none":
        names = ", ".join(CODEBOOKS)
        raise ValueError(f"--codebook none is given, but a copy is quantised: choose from {names}, or use the original")
    options = (a.codebook, a.block_size, a.double_quant)
    folder = ql.quantize_folder(a.model, a.out, *options, plan=a.plan, also=a.also, progress=not a.quiet)
    print_share(a, folder_in_4_bits(folder))  # from shapes: no weight is read
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # bytes
    report(a, {"model": a.model, "folder": str(folder), "bytes_of_weights": size, "read_by": read_by(folder)})
