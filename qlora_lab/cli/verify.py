"""Check that a run, an adapter, a model on disk, or rows of a sweep, multiple choice or tournament are as written."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from qlora_lab.cli.options import common

EXAMPLE = "qlora-lab verify runs/first"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", help="a folder from a command of qlora-lab, or a file of rows: sweep, multiple-choice, tournament"
    )
    common(parser)


def run(a: argparse.Namespace) -> int:
    from qlora_lab.files.results_file import verify_rows
    from qlora_lab.train.verify import verify

    parts = verify_rows(a.folder) if Path(a.folder).is_file() else verify(a.folder, progress=not a.quiet)
    if a.json:
        print(json.dumps([asdict(part) for part in parts]))
    else:
        width = max(len(part.name) for part in parts)
        for part in parts:
            files = [name.removeprefix(part.name) for name in part.files if name != part.name]
            print(f"{part.name:<{width}}  {part.state}{': ' * bool(any(files))}{', '.join(filter(None, files))}")
    return 0 if all(part.is_well for part in parts) else 1  # missing counts as different
