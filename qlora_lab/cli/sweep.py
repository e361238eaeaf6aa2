"""Measure perplexity by data type, block size and double quantization; if interrupted, run it again to continue."""

import argparse
import json

from qlora_lab.cli.loading import DOUBLE_QUANT, add_double_quant, add_measured, add_rows, add_text, read_text
from qlora_lab.cli.options import levels, whole
from qlora_lab.cli.printing import table

EXAMPLE = "qlora-lab sweep smollm2-135m --codebooks nf4 fp4 --block-sizes 64 128 --double-quant both --out rows.jsonl"
LESS_MEMORY = "use a lower --length; the rows that are in --out are kept"


def add_options(parser: argparse.ArgumentParser) -> None:
    models = add_measured(parser)
    add = models.add_argument
    kinds = "nf4, fp4, int4, ..., or lloyd-max, which is fitted to the model"
    add("--codebooks", nargs="+", default=["nf4", "fp4", "int4"], metavar="NAME", help=kinds)
    table_help = "a codebook of your own, from -1 to 1: mine=-1,-0.4,-0.1,0,0.1,0.3,0.6,1; may be repeated"
    add("--levels", action="append", type=levels, default=[], metavar="NAME=V1,V2,...", help=table_help)
    add("--block-sizes", nargs="+", type=whole, default=[64], metavar="N", help="weights in a block, 16 to 4096")
    add_double_quant(models, "off")
    add("--seed", type=whole, default=0, metavar="N", help="seed for sampling the weights that lloyd-max is fitted to")
    add_text(parser, windows=8, length=512, default="Python's help topics")
    add_rows(parser)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.measure.sweep import sweep, variants

    tables = dict(a.levels)  # name -> levels
    if len(tables) < len(a.levels):
        raise ValueError("--levels: two codebooks have the same name: rename one of them")
    codebooks = dict.fromkeys([*a.codebooks, *tables])  # each once
    grid = variants(codebooks, a.block_sizes, DOUBLE_QUANT[a.double_quant])
    grid = [variant._replace(levels=tables.get(variant.codebook)) for variant in grid]
    options = {"windows": a.windows, "length": a.length, "seed": a.seed, "progress": not a.quiet}
    if a.text is not None:
        options["text"] = read_text(a.text)
    rows = sweep(a.model, grid, a.out, **options)
    if a.json:
        print(json.dumps(rows))
        return
    whole_model = rows[0]["perplexity"]  # of the model without quantisation
    print(table([_cells(row, whole_model) for row in sorted(rows, key=lambda row: row["perplexity"])]))


def _cells(row: dict, whole_model: float) -> dict[str, str]:
    quantised = row["codebook"] is not None
    return {
        "codebook": row["codebook"] or "none",
        "block size": str(row["block_size"]) if quantised else "",
        "double quant": ("yes" if row["double_quant"] else "no") if quantised else "",
        "bits": f"{row['bits_per_parameter']:.3f}",  # per parameter, constants included
        "perplexity": f"{row['perplexity']:.3f}",
        "more": f"{row['perplexity'] / whole_model - 1:.1%}" if quantised else "",
        "squared error": f"{row['relative_error']:.5f}" if quantised else "",
        "entropy": f"{row['entropy']:.3f}" if quantised else "",  # bits per code
    }
