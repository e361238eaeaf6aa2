"""Look into a checkpoint in 4 bits, and say what is wrong with it; with two, how they differ."""

import argparse
import json
from typing import TYPE_CHECKING

from qlora_lab.cli.options import common, one_line
from qlora_lab.cli.printing import table

if TYPE_CHECKING:
    from qlora_lab.export.xray import Checkpoint, Tensor4bit
    from qlora_lab.export.xray_diff import Difference

EXAMPLE = "qlora-lab xray quantised/model-00001-of-00001.safetensors"
CUT = 60  # characters of a name in a table


def add_options(parser: argparse.ArgumentParser) -> None:
    file = "a safetensors file with tensors in 4 bits, ours or of bitsandbytes, or a model's folder"
    parser.add_argument("file", help=file)
    parser.add_argument("other", nargs="?", help="another one, to compare with the first")
    common(parser)


def run(a: argparse.Namespace) -> int:
    """Return 0, 1 if two checkpoints differ, or 2 if something is wrong with one of them."""
    # torch is loaded here, after --help and the parser
    from qlora_lab.export.xray import Checkpoint, scanned
    from qlora_lab.export.xray_diff import compare

    checkpoints = [Checkpoint(path) for path in (a.file, a.other) if path is not None]
    # every constant is read once
    faults = {str(one.path): scanned(one, progress=not a.quiet) for one in checkpoints}
    if a.other is None:
        shown = {"tensors": [_figures(checkpoints[0], one) for one in checkpoints[0].tensors.values()]}
        shown |= {"stacks": sorted(checkpoints[0].stacks), "not_quantised": _not_quantised(checkpoints[0])}
        lines = _described(checkpoints[0])
    else:
        differences = compare(*checkpoints, progress=not a.quiet)
        shown = {"differences": [vars(one) for one in differences if not one.is_equal]}
        lines = _compared(differences)
    _report(a, shown | {"faults": faults}, lines)
    if any(faults.values()):  # a damaged file is a mistake, whatever else was asked
        return 2
    return 1 if shown.get("differences") else 0


def _report(a: argparse.Namespace, shown: dict, lines: list[str]) -> None:
    if a.json:
        print(json.dumps(shown))
        return
    several = len(shown["faults"]) > 1
    for path, sentences in shown["faults"].items():
        # a key of the file may hold anything, also what a terminal would obey
        lines += [f"fault: {f'{path}: ' * several}{one_line(sentence)}" for sentence in sentences]
    print("\n".join(lines))


def _figures(checkpoint: "Checkpoint", tensor: "Tensor4bit") -> dict:
    parts = {name: checkpoint.parts[name] for name in tensor.names}
    return {
        "name": tensor.key,
        "data_type": tensor.quant_type,
        "block_size": tensor.block_size,
        "double_quant": tensor.offset is not None,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bits_per_parameter": tensor.bits_per_parameter,
        "blocks": tensor.n_blocks,
        "absmax_offset": tensor.offset,
        "levels": tensor.levels.tolist(),
        "parts": {
            name: {"file": part.file.name, "dtype": part.dtype, "shape": list(part.shape), "start": part.start}
            | {"bytes": part.nbytes}
            for name, part in parts.items()
        },
    }


def _described(checkpoint: "Checkpoint") -> list[str]:
    """Lay out the tensors in a table, and count the others."""
    rows = [
        {
            "tensor": _cut(tensor.key),
            "shape": " x ".join(map(str, tensor.shape)),
            "type": tensor.quant_type,
            "block": str(tensor.block_size),
            "double": "yes" if tensor.offset is not None else "no",
            "bits": f"{tensor.bits_per_parameter:.4f}",
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
        for tensor in checkpoint.tensors.values()
    ]
    stacks = f"{len(checkpoint.stacks)} stacks of experts, which are not decoded here, " * bool(checkpoint.stacks)
    count = f"{len(rows)} quantised, {stacks}{len(_not_quantised(checkpoint))} not"
    return [*([table(rows)] if rows else []), count]


def _not_quantised(checkpoint: "Checkpoint") -> list[str]:
    """List what is neither a tensor in 4 bits nor a part of packed experts."""
    stacks = checkpoint.stacks
    return [name for name in checkpoint.plain if name not in stacks and name.rpartition(".")[0] not in stacks]


def _compared(differences: list["Difference"]) -> list[str]:
    """Lay out what differs in a table, and count what does not."""
    differing = [found for found in differences if not found.is_equal]
    rows = [
        {
            "tensor": _cut(found.name),
            "bytes": _count(found, found.bytes_differ),
            "codes": _count(found, found.codes_differ, is_share=True),
            "constants": _count(found, found.constants_differ),
            "weights": _count(found, found.values_differ),
            "largest": f"{found.largest:.3g}" if found.is_compared else "",
            "blocks": _blocks(found),
        }
        for found in differing
    ]
    same = f"{len(differences) - len(differing)} equal, {len(differing)} different"
    return [*([table(rows)] if rows else []), same]


def _count(found: "Difference", count: int | None, is_share: bool = False) -> str:
    """Print a count, or that there is none: empty for a part that neither tensor has."""
    if count is None:
        return "not comparable" if found.what and found.is_compared else ""
    return f"{100 * count / found.numel:.2f} %" if is_share else f"{count:,}"


def _blocks(found: "Difference") -> str:
    if found.what:
        return one_line(found.what)
    if not found.blocks_differ:
        return ""
    more = ", ..." if found.blocks_differ > len(found.first_blocks) else ""
    return f"{found.blocks_differ:,} of {found.n_blocks:,}: {', '.join(map(str, found.first_blocks))}{more}"


def _cut(name: str) -> str:
    """Keep the end of a long name, by which layers differ."""
    name = one_line(name)
    return name if len(name) <= CUT else f"...{name[-CUT:]}"
