"""The low-rank explorer: a matrix, the best product of two thin matrices, and what is missing.

State: r, size, decay. The picture: the target, its best approximation of rank r, and the residual, all in one range of
colours; below the target's singular values, kept up to r and cut off beyond it.
"""

from matplotlib.collections import LineCollection

from qlora_lab.measure.low_rank import best_of_rank, energy, relative_error, target
from qlora_lab.show.explorer import Explorer, fix_layout
from qlora_lab.show.figure import BESIDE, COLOURS, TITLE, bars, new_figure
from qlora_lab.show.slider import Slider, Steps

SIZES = [32, 64, 128]  # rows and columns of the target


class LowRankExplorer(Explorer):
    """Rank, size and decay of the spectrum: what two thin matrices can express. See Explorer for its methods."""

    def controls(self):
        return {
            "r": Slider("Rank r", 8, Steps(1, SIZES[0])),
            "size": Slider("Size d", 64, choices=SIZES, unit="rows and columns"),
            "decay": Slider("Decay", 1.0, Steps(0.0, 3.0, 0.25)),
        }

    @staticmethod
    def compute(state):
        matrix = target(state["size"], state["decay"])
        B, A, s = best_of_rank(matrix, state["r"])  # (size, r), (r, size), (size,)
        return {
            "matrix": matrix,  # (size, size)
            "product": B @ A,  # (size, size)
            "parameters": B.numel() + A.numel(),
            "singular_values": s,
            "energy": energy(s)[state["r"] - 1].item(),  # share that rank r holds
            "relative_error": relative_error(matrix, B @ A),
        }

    def draw(self):
        fig, ax = new_figure(width=BESIDE, height=4.1)
        ax.remove()  # three squares have its upper part
        upper, lower = fig.add_gridspec(2, 1, height_ratios=[1.55, 1])
        squares = upper.subgridspec(1, 3).subplots()
        below = fig.add_subplot(lower)
        self.images = [ax.imshow([[0]], extent=(0, 1, 0, 1), cmap="RdBu", interpolation="nearest") for ax in squares]
        for ax in squares:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        self.names = [ax.text(0.5, -0.05, "d", transform=ax.transAxes, ha="center", va="top") for ax in squares]
        self.title = squares[0].set_title("energy", loc="left", fontsize=TITLE)
        below.spines[["top", "right"]].set_visible(False)
        below.set(xlabel="k", ylim=(0, 1.05), xscale="log", yticks=[0, 0.5, 1], ylabel="singular value")
        below.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
        below.minorticks_off()
        self.kept = below.add_collection(LineCollection([], colors=COLOURS["blue"], lw=2))
        self.cut_off = below.add_collection(LineCollection([], colors=COLOURS["orange"], lw=2))
        (self.cut,) = below.plot([], [], color=COLOURS["black"], lw=1, ls="--")
        self.below = below  # its limits follow the size
        below.set_xlim(0.8, 1.2 * SIZES[-1])
        fix_layout(fig)
        return fig, [*self.images, *self.names, self.title, self.kept, self.cut_off, self.cut]

    def update(self, result):
        matrix = result["matrix"]
        product = result["product"]
        s = result["singular_values"]
        size = len(matrix)
        r = result["parameters"] // (2 * size)
        reach = matrix.abs().max().item() / 2  # a few weights exceed it, and all others get more contrast
        for image, shown in zip(self.images, (matrix, product, matrix - product), strict=True):
            image.set_data(shown.numpy())
            image.set_clim(-reach, reach)  # one range for all: a pale residual is a small one
        for name, text in zip(self.names, (f"target {size} x {size}", f"rank {r}", "residual"), strict=True):
            name.set_text(text)
        share = 100 * result["parameters"] / size**2  # %
        self.title.set_text(f"{share:.0f} % of the numbers hold {100 * result['energy']:.1f} % of the energy")
        lines = bars(range(1, size + 1), s / s[0])  # shares of the largest
        self.kept.set_segments(lines[:r])
        self.cut_off.set_segments(lines[r:])
        self.cut.set_data([r + 0.5] * 2, [0, 1.05])
        self.below.set_xlim(0.8, 1.2 * size)  # a new limit costs a full redraw

    @staticmethod
    def describe(state, result):
        size = state["size"]
        parameters = result["parameters"]
        return (
            f"{size} x {size}, decay {state['decay']:g}, r={state['r']}: {parameters:,} parameters, "
            f"{100 * parameters / size**2:.0f} % of {size**2:,}; {100 * result['energy']:.1f} % of the energy, "
            f"relative error {100 * result['relative_error']:.1f} %"
        )
