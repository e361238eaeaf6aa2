"""Show what the GPU kernels are compiled to, without a GPU."""

import argparse
import json
from dataclasses import asdict

from qlora_lab.cli.options import common, whole
from qlora_lab.cli.printing import table

EXAMPLE = "qlora-lab kernels dequantize_nf4 --arch 80 --arch 90 --compare"


def add_options(parser: argparse.ArgumentParser) -> None:
    chosen = "kernels to show, such as dequantize_nf4 (default: all that support --dtype)"
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help=chosen)
    add = parser.add_argument_group("target").add_argument
    add("--arch", type=whole, action="append", metavar="SM", help="80, 90 or 100; may be repeated (default: 90)")
    add("--dtype", default="bfloat16", metavar="NAME", help="float32, bfloat16 or float16")
    size = ("ROWS", "COLUMNS")
    add("--shape", type=whole, nargs=2, default=(4096, 4096), metavar=size, help="shape of the weight")
    add("--tokens", type=whole, default=256, metavar="N", help="tokens in a product")
    output = parser.add_argument_group("output")
    output.add_argument("--compare", action="store_true", help="add the bitsandbytes kernels that do the same work")
    output.add_argument("--sass", metavar="RUNG", help="print the machine code of one kernel instead")
    output.add_argument("--ptx", metavar="RUNG", help="print the PTX of one kernel instead")
    common(output)


def run(a: argparse.Namespace) -> None:
    from qlora_lab.gpu_code import aot

    archs = list(dict.fromkeys(a.arch or [90]))  # each once, in the order given
    if a.sass is not None or a.ptx is not None:
        _print_code(a, archs)
        return
    aot.check_product(a.shape, a.tokens)  # before minutes of compilation
    rows, notes = _compared(a, archs)
    rooflines = [aot.roofline(kernel, tuple(a.shape), a.tokens) for _, kernel in rows]  # a list of cards for each row
    if a.json:
        cards = [
            [asdict(roof) | {"seconds": roof.seconds, "bound": roof.bound} for roof in roofs] for roofs in rooflines
        ]
        records = [asdict(kernel) | {"roofline": card} for (_, kernel), card in zip(rows, cards, strict=True)]
        print(json.dumps({"kernels": records, "notes": notes}))
        return
    print(f"Instructions per weight ({a.dtype}) that a thread executes in a full tile, counted in machine code")
    print(table([_mix(*row) for row in rows]))
    print("\nResources; bytes per weight, requested and least possible; bits of global loads and stores")
    print(table([_resources(*row) for row in rows]))
    product = f"{a.shape[0]} x {a.shape[1]} weights and {a.tokens} tokens"
    print(f"\nLeast microseconds by data sheet, and the bottleneck: a model, not a measurement; {product}")
    print(table([_roofs(name, kernel, roofs) for (name, kernel), roofs in zip(rows, rooflines, strict=True)]))
    if notes:
        has_peers = any(name.startswith("  ") for name, _ in rows)
        print("", *(f"Indented: {note}." if has_peers else f"{note}." for note in notes), sep="\n")


def _print_code(a: argparse.Namespace, archs: list[int]) -> None:
    from qlora_lab.gpu_code import aot

    if a.rungs or a.json or a.compare:
        raise ValueError("--sass and --ptx print the code of the one kernel that they name: leave out all else")
    code, name = (aot.sass, a.sass) if a.sass is not None else (aot.ptx, a.ptx)
    print("\n".join(code(name, arch, a.dtype) for arch in archs))


def _compared(a: argparse.Namespace, archs: list[int]) -> tuple[list[tuple], list[str]]:
    """Return rows of (name, kernel): each of ours, followed by those of bitsandbytes that do the same work."""
    from qlora_lab.gpu_code import aot

    ours = aot.report(a.rungs or None, archs, a.dtype, progress=not a.quiet)
    theirs = []
    notes = []
    for arch in archs if a.compare else []:
        kernels, note = aot.bitsandbytes_report(arch, a.dtype)
        theirs += kernels or []  # None if bitsandbytes or its code is missing
        notes.append(note)
    rows = []
    for kernel in ours:
        peers = [peer for peer in theirs if (peer.rung, peer.arch) == (kernel.rung, kernel.arch)]
        rows.append((kernel.rung, kernel))
        rows += [(f"  {peer.kernel.split('<')[0]}", peer) for peer in peers]  # without its template arguments
    return rows, notes


def _mix(name: str, kernel) -> dict[str, str]:
    from qlora_lab.gpu_code.machine_code import KINDS

    names = ("tensor", "load", "store", "shared", "local", "convert", "float", "integer", "other")
    counts = {name: f"{kernel.mix[kind]:.2f}" for name, kind in zip(names, KINDS, strict=True)}
    return {"rung": name, "sm": str(kernel.arch), **counts, "sum": f"{kernel.per_weight:.2f}"}


def _resources(name: str, kernel) -> dict[str, str]:
    from qlora_lab.gpu_code.machine_code import widths

    return {
        "rung": name,
        "sm": str(kernel.arch),
        "registers": str(kernel.registers),  # per thread
        "shared bytes": str(kernel.shared),  # per program
        "spills": str(kernel.spills),  # loads and stores of registers that did not fit
        "occupancy": f"{kernel.occupancy:.0%}",  # warps, of those that a multiprocessor can hold
        "bytes": f"{kernel.moved:.2f} / {kernel.least:.2f}",  # per weight
        "bits": " / ".join(" ".join(map(str, side)) for side in widths(kernel.accesses)),
    }


def _roofs(name: str, kernel, roofs: list) -> dict[str, str]:
    """Lay out one kernel's times on the cards; a card that has no unit for the dtype says so."""
    times = []
    for roof in roofs:
        time = f"{roof.seconds * 1e6:.3g} {roof.bound}" if roof.seconds else f"no {kernel.dtype}"
        times.append(f"{roof.card} {time}")
    return {"rung": name, "sm": str(kernel.arch), "cards": ", ".join(times)}
