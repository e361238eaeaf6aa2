"""Show which experts of a mixture a text uses, and what quantising each of them would cost."""

import argparse
import json
from dataclasses import asdict
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

import qlora_lab as ql
from qlora_lab.cli.loading import add_measured, add_text, read_text
from qlora_lab.cli.options import add_fields, common
from qlora_lab.cli.printing import table
from qlora_lab.train.run_options import ModelOptions

if TYPE_CHECKING:
    from qlora_lab.measure.expert_use import ExpertUse

EXAMPLE = "qlora-lab experts allenai/OLMoE-1B-7B-0924 --text mine.txt"
LESS_MEMORY = "use a lower --length: a mixture is read in 32 bits, with the gradients of one window"
NAMED = 5  # experts of a layer; --json has all of them


def add_options(parser: argparse.ArgumentParser) -> None:
    group = add_measured(parser)
    tried = "data type to try on each expert, such as nf4, fp4 or int4: how much the loss would rise is reported"
    group.add_argument("--codebook", default=ModelOptions.codebook, help=tried)  # none would be nothing to try
    add_fields(group, ModelOptions, "block_size", "double_quant")
    add_text(parser, windows=8, length=512, default="Python's help topics")
    common(parser.add_argument_group("output"))


def run(a: argparse.Namespace) -> None:
    from qlora_lab.measure.perplexity import check_windows
    from qlora_lab.quant.plan import Candidate, check_candidate

    candidate = Candidate(a.codebook, a.block_size, a.double_quant)
    check_candidate(candidate)  # a mixture takes minutes to load
    check_windows(a.length, a.windows)
    rows = _rows(a, candidate)
    print(json.dumps({"rows": [asdict(row) for row in rows]}) if a.json else _by_layer(rows))


def _rows(a: argparse.Namespace, candidate) -> list["ExpertUse"]:
    import torch

    from qlora_lab.measure.expert_use import expert_use
    from qlora_lab.measure.perplexity import topics_text
    from qlora_lab.measure.sensitivity import calibration

    text = topics_text() if a.text is None else read_text(a.text)  # first: a model may have to be fetched
    _check_mixture(a)
    model, tokenizer = ql.load(a.model, codebook=None, dtype=torch.float32, progress=not a.quiet)
    batches = calibration(model, tokenizer, text, a.windows, a.length)
    return expert_use(model, tokenizer, batches, candidate, progress=not a.quiet)


def _check_mixture(a: argparse.Namespace) -> None:
    """Raise ValueError for a dense model, which its configuration tells in a second, and loading in minutes."""
    import torch

    from qlora_lab.model.empty_model import empty_model
    from qlora_lab.model.experts import stacks_of
    from qlora_lab.model.fetch import resolve

    model = empty_model(resolve(a.model, progress=not a.quiet), torch.float32)
    if not stacks_of(model):
        family = type(model).__name__
        raise ValueError(f"{a.model} is a {family}, which has no experts: give a mixture, such as {EXAMPLE.split()[2]}")


def _by_layer(rows: list["ExpertUse"]) -> str:
    """Return a line for each layer: how many experts got no token, the busiest, and the one that costs most."""
    lines = []
    for layer, group in groupby(rows, attrgetter("layer")):
        experts = sorted(group, key=lambda row: -row.tokens)  # stable: equal ones stay in the model's order
        dear = max(experts, key=lambda row: row.change)
        lines.append(
            {
                "layer": layer,
                "experts": str(len(experts)),
                "unused": str(sum(not row.tokens for row in experts)),
                "costs most": f"{dear.expert}: {dear.change:.3g} nats",
                "tokens of the busiest": ", ".join(f"{row.expert}: {row.tokens:,}" for row in experts[:NAMED]),
            }
        )
    return table(lines)
