"""Download a model to this machine."""

import argparse

import qlora_lab as ql
from qlora_lab.cli.options import common
from qlora_lab.cli.printing import report

EXAMPLE = "qlora-lab fetch smollm2-135m"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a known name, such as smollm2-135m")
    common(parser)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.files.strict_json import read_json

    folder = ql.fetch(a.model, progress=not a.quiet)  # nothing is downloaded twice
    source = folder / "source.json"
    origin = read_json(source) if source.exists() else {}  # where it came from; a user's own folder has none
    report(a, {"model": a.model, "folder": str(folder)} | origin)
