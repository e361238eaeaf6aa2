"""Predict every byte of a training step, and what fits on a card; no weights are needed."""

import argparse
import json
from dataclasses import fields

import qlora_lab as ql
from qlora_lab.cli.loading import targets_of
from qlora_lab.cli.options import add_field, add_fields, common, number
from qlora_lab.memory.setup import Setup

EXAMPLE = "qlora-lab memory llama-7b --gpu 24 --r 64 --max-length 1024"
# Fields of Setup that a run here decides.
NOT_OPTIONS = ("dropout", "padded", "paged", "master_copies", "fused_adapter", "wide_attention", "pair_attention")

ADAPTER = ("r", "targets", "size", "virtual_tokens", "mlp", "parts", "adapter_dtype")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a known name, such as llama-7b or llama-2-70b, a folder, or a config.json")
    model = parser.add_argument_group("model")
    add_fields(model, Setup, "method", "codebook", "block_size", "double_quant", "also", "dtype")
    data = parser.add_argument_group("data")
    add_field(data, Setup, "length", flag="--max-length")
    add_fields(data, Setup, "mean_length", "packing", "learned", "pictures")
    run_group = parser.add_argument_group("run")
    gpu_help = "memory of the card; recommends settings that fit, and shows their limits"
    run_group.add_argument("--gpu", type=number, metavar="GB", help=gpu_help)
    add_fields(run_group, Setup, "device", "batch_size", "micro_batch_size", "gradient_checkpointing")
    add_fields(parser.add_argument_group("adapter"), Setup, *ADAPTER)
    add_fields(parser.add_argument_group("optimizer"), Setup, "optimizer_bits", "optimizer_budget")
    common(parser.add_argument_group("output"))


def run(a: argparse.Namespace) -> int:
    setup = {field.name: getattr(a, field.name) for field in fields(Setup) if field.name in a}
    setup["targets"] = targets_of(a)  # one word, or a list of names
    result = ql.predict_memory(a.model, **setup) if a.gpu is None else ql.fit(a.model, a.gpu, **setup)
    print(json.dumps(result.to_dict()) if a.json else result)
    return 0 if a.gpu is None or result.fits else 1  # 1: it does not fit, whatever is switched on
