"""The block size explorer: a budget of bits, the block size that it buys each layer, and the gain of this mix.

State: budget. The picture: above a map of the model with a column for each block of layers and a row for each
projection, coloured by the chosen candidate, and the number of layers for each; below bits against error, of the best
mix for every budget and of one candidate for all layers.
"""

import math
import re

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.text import Text

from qlora_lab.measure.best_plan import Choices, best_plan, uniform
from qlora_lab.quant.plan import Candidate, Plan
from qlora_lab.show.escape import for_picture
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, COLOURS, SMALLEST, TITLE, all_masked, new_figure
from qlora_lab.show.slider import Slider

BETWEEN = 4  # budgets from one uniform plan's bits to the next plan's
DOUBLE = ", double"
NAME_ROOM = 0.04  # share of the frontier's height that a name needs
DIGITS = 5  # of a budget: enough for the exact bits of block size 1024, 4.03125


def stops(choices: Choices) -> list[float]:
    """List budgets for a slider, bits per parameter, ascending: each uniform plan's bits, and three steps between two.

    Even steps would leave the large blocks, whose bits lie close together, one or two budgets.
    """
    needed = sorted({uniform(choices, candidate).bits_per_parameter for candidate in choices.candidates})
    cheapest, dearest = (take(choices.bits, axis=1).sum() / sum(choices.numel) for take in (np.min, np.max))
    edges = [round_up(bits) for bits in sorted({cheapest, *needed, dearest})]
    steps = [a + (b - a) * i / BETWEEN for a, b in zip(edges, edges[1:], strict=False) for i in range(BETWEEN)]
    return sorted({round(step, DIGITS) for step in (*steps, edges[-1])})


def round_up(bits: float) -> float:
    """Round to DIGITS digits, never below `bits`: a budget must pay for its uniform plan."""
    return math.ceil(bits * 10**DIGITS) / 10**DIGITS


def places(layers: tuple[str, ...]) -> tuple[list[int], list[str], dict[str, tuple[int, int]]]:
    """Return block numbers, projections, and the (row, column) of each layer: a row for each projection, and a column
    for each block, since a page is wider than a picture is high. ValueError if two layers share a cell.

    A projection is the part of a name after its first number. Its last word stands for it, if no other ends in that.

    >>> places(("model.layers.0.mlp.up_proj", "model.layers.3.self_attn.q_proj"))[:2]
    ([0, 3], ['up', 'q'])
    """
    split = {layer: re.fullmatch(r"(?:.*?\.(\d+)\.)?(.*?)(?:\.weight)?", layer).groups() for layer in layers}
    number = {layer: int(block or 0) for layer, (block, _) in split.items()}  # without a number: block 0
    parts = list(dict.fromkeys(part for _, part in split.values()))
    last = [part.rpartition(".")[2] for part in parts]
    names = [w.removesuffix("_proj") if last.count(w) == 1 else part for part, w in zip(parts, last, strict=True)]
    blocks = sorted(set(number.values()))  # their numbers, without gaps on the map
    cells = {layer: (parts.index(part), blocks.index(number[layer])) for layer, (_, part) in split.items()}
    taken: dict[tuple[int, int], str] = {}
    for layer, cell in cells.items():
        if taken.setdefault(cell, layer) != layer:
            raise ValueError(
                f"{taken[cell]} and {layer} share one place on the map, block {number[layer]}, {names[cell[0]]}: "
                "leave one of them out of the choices"
            )
    return blocks, names, cells


def draw_map(ax: Axes, layers: tuple[str, ...]) -> tuple[np.ma.MaskedArray, dict[str, tuple[int, int]]]:
    """Name the sides of a map of the model; return its cells, all masked, (projections, blocks), and their places.

    Raises ValueError if two layers share a cell.
    """
    blocks, names, cells = places(layers)
    ax.set_yticks(range(len(names)), map(for_picture, names), fontsize=SMALLEST)
    ax.set_xticks(range(0, len(blocks), max(1, len(blocks) // 6)))
    ax.set_xticklabels([blocks[i] for i in ax.get_xticks()])
    ax.set_xlabel("block of layers")
    ax.tick_params(length=0)
    return all_masked((len(names), len(blocks))), cells


def names_of(candidates: tuple[Candidate, ...]) -> dict[Candidate, str]:
    """Name candidates as briefly as tells them apart."""
    several = len({c.codebook for c in candidates}) > 1  # else the name of the codebook says nothing
    return {
        c: f"{c.codebook + ' ' if several else ''}{c.block_size}{DOUBLE if c.double_quant else ''}" for c in candidates
    }


class BlockSizeExplorer(Explorer):
    """A budget, the block size of each layer, and the frontier of bits and error. See Explorer.

    BlockSizeExplorer(choices, budget=4.5): choices come from measure.sensitivity.choices_of; the budget is one of
    stops(choices). Raises ValueError if two layers share a place on the map.
    """

    def __init__(self, choices: Choices, **state):
        self.choices = choices
        self.plans = {budget: best_plan(choices, budget) for budget in stops(choices)}  # the solver runs once for each
        pairs = ((candidate, uniform(choices, candidate)) for candidate in choices.candidates)
        self.uniform = sorted(pairs, key=lambda pair: pair[1].bits_per_parameter)  # the order of the colours
        self.names = names_of(choices.candidates)
        super().__init__(**state)

    def controls(self):
        budgets = list(self.plans)
        return {"budget": Slider("Budget", budgets[len(budgets) // 2], choices=budgets, unit="bits per parameter")}

    def compute(self, state):
        plan = self.plans[state["budget"]]
        payable = [pair for pair in self.uniform if pair[1].bits_per_parameter <= state["budget"]]
        chosen = list(plan.chosen.values())
        return {
            "plan": plan,
            "uniform": min(payable, key=lambda pair: pair[1].error, default=None),  # the best that the budget buys
            "counts": {candidate: chosen.count(candidate) for candidate, _ in self.uniform},  # layers
        }

    def draw(self):
        ranks = [candidate for candidate, _ in self.uniform]
        key = max(1.6, 0.2 * len(ranks))  # inches: names beside the map keep their size, so many of them make it higher
        fig, ax = new_figure(width=BESIDE, height=3.4 + key)
        ax.remove()  # its upper part is divided
        upper, lower = fig.add_gridspec(2, 1, height_ratios=[key, 2.2])
        left, middle = upper.subgridspec(1, 2, width_ratios=[2.2, 1]).subplots()
        colours = matplotlib.colormaps["cividis"](np.linspace(0, 1, max(2, len(ranks))))
        self.image = self._draw_map(left, colours)
        self.texts = self._draw_key(middle, ranks, colours)
        below = fig.add_subplot(lower)
        for axis in (left, below):
            axis.spines[["top", "right"]].set_visible(False)
        self._draw_frontier(below)
        (self.point,) = below.plot([], [], "o", ms=11, color=COLOURS["blue"], mec="#ffffff")
        self.note = left.set_title("less", loc="left", fontsize=TITLE)
        fix_layout(fig)
        return fig, [self.image, *self.texts, self.point, self.note]

    def _draw_key(self, ax: Axes, ranks: list[Candidate], colours: np.ndarray) -> list[Text]:
        ax.set(xlim=(0, 1), ylim=(max(8, len(ranks)), 0))
        ax.set_axis_off()
        square = {"marker": "s", "ms": 9, "mec": "#777777"}
        for i in range(len(ranks)):
            ax.plot([0.05], [i + 0.5], color=colours[i], **square)
        longest = [f"{self.names[candidate]}: {len(self.choices.layers)}" for candidate in ranks]  # reserves the room
        return [ax.text(0.16, i + 0.5, for_picture(text), va="center") for i, text in enumerate(longest)]

    def _draw_map(self, ax: Axes, colours: np.ndarray):
        self._map, self._cells = draw_map(ax, self.choices.layers)
        scale = {"cmap": ListedColormap(colours), "vmin": -0.5, "vmax": len(colours) - 0.5}  # one colour per candidate
        return ax.imshow(self._map, aspect="auto", interpolation="nearest", **scale)

    def _draw_frontier(self, ax: Axes) -> None:
        points = [(plan.bits_per_parameter, plan.error) for plan in self.plans.values()]
        ax.plot(*zip(*points, strict=True), color=COLOURS["blue"], lw=2, label="best mix")
        named = apart([plan for _, plan in self.uniform])
        kinds = {False: ("s", "one size for all"), True: ("D", "the same, double")}
        for double in sorted({candidate.double_quant for candidate, _ in self.uniform}):
            plans = [pair for pair in self.uniform if pair[0].double_quant == double]
            points = [(plan.bits_per_parameter, plan.error) for _, plan in plans]
            marker, label = kinds[double]
            fill = "#ffffff" if double else COLOURS["orange"]
            ax.plot(*zip(*points, strict=True), marker, color=COLOURS["orange"], mfc=fill, ms=7, label=label)
            for (candidate, plan), place in zip(plans, points, strict=True):
                name = self.names[candidate].removesuffix(DOUBLE)  # the marker shows it
                if plan in named:
                    ax.annotate(for_picture(name), place, (6, 6), textcoords="offset points", fontsize=SMALLEST)
        ax.set(xlabel="bits per parameter", ylabel="error, summed over layers")
        ax.legend(frameon=False)

    def update(self, result):
        plan = result["plan"]
        ranks = {candidate: i for i, (candidate, _) in enumerate(self.uniform)}  # candidate -> its colour
        for layer, candidate in plan.chosen.items():
            self._map[self._cells[layer]] = ranks[candidate]  # (rows, columns)
        self.image.set_data(self._map)
        for text, (candidate, count) in zip(self.texts, result["counts"].items(), strict=True):
            text.set_text(for_picture(f"{self.names[candidate]}: {count}"))
        self.point.set_data([plan.bits_per_parameter], [plan.error])
        gain = _gain(self.names, result)
        self.note.set_text(for_picture(f"The mix's error is {gain}" if result["uniform"] else gain.capitalize()))

    def describe(self, state, result):
        plan = result["plan"]
        counts = "; ".join(f"{count} with {self.names[c]}" for c, count in result["counts"].items() if count)
        return (
            f"Budget {state['budget']:.7g} bits per parameter, {plan.bits_per_parameter:.4f} spent: "
            f"error {plan.error:.4g}, {_gain(self.names, result)}. Layers by block size: {counts}"
        )

    def code(self):
        return f"BlockSizeExplorer(choices, budget={self.state['budget']!r})"


def apart(plans: list[Plan]) -> list[Plan]:
    """Select the plans, ascending in bits, whose names do not overlap: the first, and then each that lies below the
    last named plan by at least NAME_ROOM."""
    errors = [plan.error for plan in plans]
    room = NAME_ROOM * (max(errors) - min(errors))
    named: list[Plan] = []
    for plan in plans:
        if not named or plan.error < named[-1].error - room:
            named.append(plan)
    return named


def _gain(names: dict[Candidate, str], result: dict) -> str:
    """Compare the mix with the best uniform plan that the budget buys."""
    if result["uniform"] is None:
        return "no uniform plan is as small"
    candidate, plan = result["uniform"]
    if not plan.error:
        return f"as much as {names[candidate]} for all"
    return f"{100 * (1 - result['plan'].error / plan.error):.1f} % less than {names[candidate]} for all"
