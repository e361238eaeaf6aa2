"""Merge an adapter into its model, and report how far the answers of the result differ."""

import argparse
from pathlib import Path

from qlora_lab.cli.loading import add_quantization
from qlora_lab.cli.options import add_field, common
from qlora_lab.cli.printing import report
from qlora_lab.train.run_options import ModelOptions

EXAMPLE = "qlora-lab merge smollm2-135m --adapter runs/first/adapter --target dequantised --out merged"
LESS_MEMORY = "close other programs, or pass the copy from `qlora-lab quantize` as the model"
TARGETS = ("dequantised", "original", "requantised")  # of export/merge.py, which imports torch; a test compares


def add_options(parser: argparse.ArgumentParser) -> None:
    add_field(parser, ModelOptions, "model", positional=True)
    model = parser.add_argument_group("model, as the adapter was trained beside it")
    add_quantization(model)
    model.add_argument(
        "--adapter", required=True, metavar="FOLDER", help="folder of the adapter to merge, in PEFT's format"
    )
    merging = parser.add_argument_group("merge")
    what = (
        "dequantised: decoded 4-bit weights + adapter, what was trained; original: the original's weights + adapter; "
    )
    merging.add_argument(
        "--target", choices=TARGETS, default="dequantised", help=f"{what}both in 16 bits; requantised: 4 bits again"
    )
    merging.add_argument("--original", metavar="MODEL", help="for --target original, if the model is a copy in 4 bits")
    merging.add_argument(
        "--anyway", action="store_true", help="keep a merge that changes answers by more than is allowed"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the merged model")
    common(output)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.export.merge_folders import Folders, merge_folders
    from qlora_lab.quant.codebook import CODEBOOKS
    from qlora_lab.quant.plan import Candidate
    from qlora_lab.train.run_folder import find_adapter

    if a.original is not None and a.target != "original":
        raise ValueError(f"--original is for --target original, but the target is {a.target}: leave one of them out")
    if a.codebook == "none":
        raise ValueError(
            f"--codebook none is given, but it is the data type that the base had in training: choose from "
            f"{', '.join(CODEBOOKS)}; --target dequantised or original writes 16 bits. If the base was in 16 bits, "
            "merge in Python: ql.merge of a model that was loaded with codebook=None"
        )
    find_adapter(Path(a.adapter))
    options = Candidate(a.codebook, a.block_size, a.double_quant)
    folders = Folders(a.model, a.adapter, a.original)
    report(a, _figures(a, merge_folders(folders, a.out, a.target, options, anyway=a.anyway, progress=not a.quiet)))


def _figures(a: argparse.Namespace, parity) -> dict:
    figures = parity.figures()
    named = {"kl_nats_per_token": figures.pop("kl"), "same_best_token": figures.pop("agreement")}
    figures = {"folder": a.out, "target": figures.pop("target")} | named | figures
    return figures if a.json else {name: value for name, value in figures.items() if value is not None}
