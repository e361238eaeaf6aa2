"""The X-ray: click a byte of a checkpoint in 4 bits, and see its two codes, levels and weights, and their block.

State: tensor, place, byte. The picture: on the left the way of both halves of the byte from bits to weights; on the
right the block of the first weight, each weight at its level.
"""

import os.path

from qlora_lab.export.xray import Byte, Checkpoint, Half, byte_at, codes
from qlora_lab.quant.double_quant import dynamic_map
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, COLOURS, IN_DETAIL, TITLE, new_figure
from qlora_lab.show.hex_page import N_BYTES, HexPage
from qlora_lab.show.slider import Slider, Steps

ROWS = ("bits", "code", "level", "constant", "weight", "number", "block", "group: code")
HALVES = ("high half", "low half")
INKS = (COLOURS["blue"], "#bf5400")  # COLOURS["red"], darker: 4.7 : 1 on white, enough for text


class XrayExplorer(Explorer):
    """A tensor, a place in it, and a byte there. See Explorer.

    XrayExplorer(checkpoint, byte=5): the tensors are those with sixteen levels. Raises ValueError if there is none.
    """

    above = ("byte",)

    def __init__(self, checkpoint: Checkpoint, **state):
        keys = [key for key, tensor in checkpoint.tensors.items() if len(tensor.levels) == 16]
        if not keys:
            raise ValueError(f"{checkpoint.path} holds no tensor with sixteen levels, so there is no byte to explain")
        self.checkpoint = checkpoint
        self.keys = dict(zip(_short(keys), keys, strict=True))  # name on the slider -> key
        super().__init__(**state)

    def controls(self):
        names = list(self.keys)
        return {
            "tensor": Slider("Tensor", names[0], choices=names),
            "place": Slider("Place", 0, Steps(0, 100), unit="%"),
            "byte": HexPage("Byte"),
        }

    def compute(self, state):
        key = self.keys[state["tensor"]]
        tensor = self.checkpoint.tensors[key]
        n_bytes = self.checkpoint.parts[key].nbytes
        first = min(n_bytes * state["place"] // 100, n_bytes - 1) // N_BYTES * N_BYTES
        page = self.checkpoint.read_bytes(key, first, first + N_BYTES)
        byte = byte_at(self.checkpoint, key, first + state["byte"]) if state["byte"] < len(page) else None
        start = 0 if byte is None else byte.halves[0].block * tensor.block_size  # of the block, in weights
        stop = min(start + tensor.block_size, tensor.numel)
        even = start // 2 * 2  # where its first byte begins
        inside = codes(self.checkpoint, key, even, stop)[start - even :]
        return {
            "byte": byte,  # None: behind the last one
            "first": first,
            "contents": [f"{value:02x}" for value in page] + [""] * (N_BYTES - len(page)),
            "block": (start, stop),  # in weights
            "levels": tensor.levels.tolist(),
            "inside": tensor.levels[inside.int()].tolist(),  # level of each weight of the block
            "n_bytes": n_bytes,
        }

    def draw(self):
        fig, (left, right) = new_figure(2, width=BESIDE, height=3.3)
        left.get_gridspec().set_width_ratios([1.35, 1])
        left.set(xlim=(0, 3), ylim=(len(ROWS) + 1, 0))
        left.set_axis_off()
        for row, name in enumerate(ROWS, 1):
            left.text(0, row + 0.5, name, va="center")
        for column, (name, ink) in enumerate(zip(HALVES, INKS, strict=True), 1):
            left.text(column + 0.9, 0.5, name, va="center", ha="right", color=ink, weight="bold")
        font = {"va": "center", "ha": "right"}
        self.texts = [
            [left.text(column + 0.9, row + 0.5, "", color=INKS[column - 1], **font) for row in range(1, len(ROWS) + 1)]
            for column in (1, 2)
        ]
        right.set(xlim=(-0.02, 1.02), ylim=(-1.08, 1.08), ylabel="level", xticks=[])
        right.set_xlabel("weights of the block")
        self.lines = right.hlines([0] * 16, 0, 1, colors="#dddddd", lw=0.8)
        (self.dots,) = right.plot([], [], "o", ms=4, color="#777777")
        self.marks = [right.plot([], [], "o", ms=9, color=ink)[0] for ink in INKS]
        self.title = left.set_title("byte", loc="left", fontsize=TITLE)
        fix_layout(fig)
        return fig, [self.lines, self.dots, *self.marks, self.title, *self.texts[0], *self.texts[1]]

    def update(self, result):
        byte: Byte | None = result["byte"]
        start, stop = result["block"]
        self._controls["byte"].show(result["contents"], result["first"], _together(result))
        self.lines.set_segments([[(0, level), (1, level)] for level in result["levels"]])
        places = [(i + 0.5) / (stop - start) for i in range(stop - start)]
        self.dots.set_data(places, result["inside"])
        for column, mark in enumerate(self.marks):
            half = byte.halves[column] if byte else None
            inside = half is not None and half.index is not None and start <= half.index < stop
            mark.set_data([places[half.index - start]], [half.level]) if inside else mark.set_data([], [])
            for text, said in zip(self.texts[column], _column(half), strict=True):
                text.set_text(said)
        self.title.set_text("No byte is there" if byte is None else _two(byte))

    def describe(self, state, result):
        byte = result["byte"]
        where = f"{state['tensor']}, byte {result['first'] + state['byte']:,}"
        if byte is None:
            return f"{where}: no byte is there, the last is {result['n_bytes'] - 1:,}"
        weights = "; ".join(map(_said, byte.halves))
        ways = "; ".join(f"{name} {_way(half)}" for name, half in zip(HALVES, byte.halves, strict=True))
        return f"{where}, at {byte.at:,} in the file, is 0x{byte.value:02x}: {weights}{IN_DETAIL}{ways}"

    def code(self):
        return f"XrayExplorer(checkpoint, {', '.join(f'{k}={v!r}' for k, v in self.state.items())})"


def _short(keys: list[str]) -> list[str]:
    """Cut what all keys begin with, up to a dot, and `.weight` if all end so."""
    start = os.path.commonprefix(keys).rpartition(".")[0] if keys[1:] else ""
    end = ".weight" if all(key.endswith(".weight") for key in keys) else ""
    return [key[len(start) :].removeprefix(".").removesuffix(end) or key for key in keys]


def _together(result: dict) -> list[int]:
    """Return the positions on the page of bytes with a weight of the block."""
    start, stop = result["block"]
    first = result["first"]
    return [i for i in range(N_BYTES) if 2 * (first + i) < stop and 2 * (first + i) + 2 > start]


def _column(half: Half | None) -> list[str]:
    """Return the texts of ROWS for one half of a byte."""
    if half is None:
        return [""] * len(ROWS)
    start = [f"{half.code:04b}", f"{half.code}", f"{half.level:.4f}"]
    if half.index is None:
        return [*start, "", "padding", "", "", ""]
    group = "none" if half.group is None else f"{half.group}: {half.constant_code}"
    return [*start, f"x {half.constant:.4g}", f"= {half.value:.4g}", f"{half.index:,}", f"{half.block:,}", group]


def _two(byte: Byte) -> str:
    values = " and ".join("padding" if half.index is None else f"{half.value:.4g}" for half in byte.halves)
    return f"Byte 0x{byte.value:02x} is two weights: {values}"


def _said(half: Half) -> str:
    if half.index is None:
        return f"code {half.code}, padding"
    return f"code {half.code}, weight ({', '.join(map(str, half.place))}) = {half.value:.4g}"


def _way(half: Half) -> str:
    if half.index is None:
        return "padding"
    said = f"level {half.level:.4f} x {half.constant:.4g} of block {half.block}"
    if half.group is None:
        return said
    value = dynamic_map()[half.constant_code].item()
    nested = f"{value:.4g} x scale {half.scale:.4g} of group {half.group} + offset {half.offset:.4g}"
    return f"{said}, constant by code {half.constant_code}: {nested}"
