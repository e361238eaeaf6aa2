"""Choose each layer's data type and block size to lose least within a bit budget; pass the plan to quantize --plan."""

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import qlora_lab as ql
from qlora_lab.cli.loading import add_measured, add_text, read_text
from qlora_lab.cli.options import common, number, whole
from qlora_lab.cli.printing import report

if TYPE_CHECKING:
    from qlora_lab.quant.plan import Candidate, Plan

EXAMPLE = "qlora-lab block-size smollm2-135m --bits 4.5 --out plan.json"
LESS_MEMORY = "use a lower --length, or fewer --windows"
SIZES = [32, 64, 128, 256, 512, 1024]  # weights in a block


def add_options(parser: argparse.ArgumentParser) -> None:
    add = add_measured(parser).add_argument
    add("--bits", type=number, required=True, help="limit on bits per parameter, constants included")
    add("--codebooks", nargs="+", default=["nf4"], metavar="NAME", help="data types to choose from")
    add("--block-sizes", nargs="+", type=whole, default=SIZES, metavar="N", help="block sizes to choose from")
    add("--double-quant", action="store_true", help="quantise the scaling constants of every layer")
    add("--constants-share", type=number, metavar="S", help="limit on bits of constants per bit of codes, such as 0.05")
    alike = "layers of one module with fewer than N weights get the same choice"
    add("--share-below", type=whole, default=0, metavar="N", help=alike)
    add_text(parser, windows=12, length=256, default="half of Python's help topics")
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="FILE", help="file for the plan")
    common(output)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.files.lock import locked_file, reserved
    from qlora_lab.measure.best_plan import check_limits
    from qlora_lab.measure.perplexity import check_windows
    from qlora_lab.quant.numbers import check_whole
    from qlora_lab.quant.plan import Candidate, check_candidate, check_plan_path

    candidates = tuple(Candidate(name, size, a.double_quant) for name in a.codebooks for size in a.block_sizes)
    for candidate in candidates:  # before the model is loaded, as for finetune
        check_candidate(candidate)
    check_limits(a.bits, a.constants_share)
    check_whole("share-below", a.share_below, 0)
    check_windows(a.length, a.windows)  # needs no model
    out = check_plan_path(a.out)
    with locked_file(out, "block-size") as lock, reserved(lock):  # two commands must not write one plan
        _report(a, candidates, _plan(a, candidates), out)


def _plan(a: argparse.Namespace, candidates: tuple["Candidate", ...]) -> "Plan":
    import torch

    from qlora_lab.measure.best_plan import Choices, best_plan, small_layers, unmeasured
    from qlora_lab.measure.perplexity import topics_text
    from qlora_lab.measure.sensitivity import choices_of, sensitivity
    from qlora_lab.model.quantised import shapes_to_quantise

    topics = topics_text()  # part of every Python, so nothing is downloaded
    # Perplexities are measured on the first half, so a plan is calibrated on the second.
    text = topics[len(topics) // 2 :] if a.text is None else read_text(a.text)
    model, tokenizer = ql.load(a.model, codebook=None, dtype=torch.float32, progress=not a.quiet)

    def best(choices: Choices) -> "Plan":
        groups = small_layers(choices, a.share_below)  # modules whose small layers choose as one
        return best_plan(choices, a.bits, constants_share=a.constants_share, groups=groups)

    best(unmeasured(shapes_to_quantise(model), candidates))  # limits that are too low raise before the long part
    options = {"windows": a.windows, "length": a.length, "fisher": True, "progress": not a.quiet}
    measured = sensitivity(model, tokenizer, text, **options)
    del model  # choices_of reads the weights again, layer by layer
    return best(choices_of(a.model, candidates, measured, progress=not a.quiet))


def _report(a: argparse.Namespace, candidates: tuple["Candidate", ...], plan: "Plan", out: Path) -> None:
    figures = {"plan": str(plan.save(out)), "bits_per_parameter": plan.bits_per_parameter}
    figures["expected_increase_of_loss"] = plan.error
    counts = Counter(plan.chosen.values())  # layers per candidate
    layers = {f"layers_{c.codebook}_{c.block_size}": counts[c] for c in candidates if counts[c]}
    report(a, figures | layers)
