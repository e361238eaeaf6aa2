"""The low-rank explorer: a matrix, the best product of two thin matrices, and what is missing.

State: r, size, decay. The picture: the target, its best approximation of rank r, and the residual, all in one range of
colours; on the right the target's singular values, kept up to r and cut off behind it.

In: a matrix, (out, in). Out: B, (out, r), and A, (r, in), named as an adapter's two matrices. Source: Eckart and Young
(1936): of all products of rank r, the first r terms of the singular value decomposition are nearest.

Not here: how training finds B and A; it never sees the target (adapters/lora.py).
"""

from functools import lru_cache

import torch
from matplotlib.collections import LineCollection

from qlora_lab.show.explorer import Explorer
from qlora_lab.show.figure import COLOURS, new_figure
from qlora_lab.show.slider import Slider

SIZES = [32, 64, 128]


@lru_cache  # a slider that moves asks for the same ones again, and they take longer than all else
def directions(size: int) -> torch.Tensor:
    """(2, size, size) float32: two random orthogonal matrices, always the same."""
    return torch.linalg.qr(torch.randn(2, size, size, generator=torch.Generator().manual_seed(0))).Q


def target(size: int, decay: float) -> torch.Tensor:
    """(size, size) float32 with singular values k^-decay, k = 1, 2, ..., in random directions."""
    left, right = directions(size)
    return left * torch.arange(1, size + 1) ** -decay @ right.t()


def best_of_rank(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """B, (out, r), and A, (r, in), whose product is nearest to `matrix`; and all its singular values, descending.

    >>> B, A, s = best_of_rank(torch.tensor([[8.0, 16, 4], [4, 8, 2], [12, 24, 6]]), 1)
    >>> (B @ A).round().tolist()
    [[8.0, 16.0, 4.0], [4.0, 8.0, 2.0], [12.0, 24.0, 6.0]]
    """
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :r] * s[:r], Vh[:r], s  # (out, r), (r, in), (min(out, in),)


def energy(singular_values: torch.Tensor) -> torch.Tensor:
    """Share of the sum of squares that the first 1, 2, ... directions hold, same shape as given, ending at 1."""
    squares = singular_values.square()
    return squares.cumsum(0) / squares.sum()


class LowRankExplorer(Explorer):
    """Rank, size and decay of the spectrum: what two thin matrices can say. See Explorer for what it can do."""

    def controls(self):
        return {
            "r": Slider("Rank r", 8, low=1, high=SIZES[0]),
            "size": Slider("Size d", 64, choices=SIZES, unit="rows and columns"),
            "decay": Slider("Decay", 1.0, low=0.0, high=3.0, step=0.25),
        }

    @staticmethod
    def compute(state):
        matrix = target(state["size"], state["decay"])
        B, A, s = best_of_rank(matrix, state["r"])
        return {
            "matrix": matrix,
            "product": B @ A,
            "parameters": B.numel() + A.numel(),
            "singular_values": s,
            "energy": energy(s)[state["r"] - 1].item(),
            "relative_error": ((matrix - B @ A).norm() / matrix.norm()).item(),
        }

    def draw(self):
        fig, (*squares, right) = new_figure(4, width=7.2, height=2.3)
        self.images = [ax.imshow([[0]], extent=(0, 1, 0, 1), cmap="RdBu", interpolation="nearest") for ax in squares]
        for ax in squares:
            ax.set(xticks=[], yticks=[])
            ax.spines[["left", "bottom"]].set_visible(False)
        self.titles = [ax.text(0.5, 1.04, "", transform=ax.transAxes, ha="center", fontsize=12) for ax in squares]
        right.set(xlabel="k", ylim=(0, 1.05), xscale="log", yticks=[0, 0.5, 1])
        right.set_xticks([1, 2, 4, 8, 16, 32, 64, 128], ["1", "2", "4", "8", "16", "32", "64", "128"])
        right.minorticks_off()
        right.set_title("singular values", fontsize=12)
        self.kept = right.add_collection(LineCollection([], colors=COLOURS["blue"], lw=2))
        self.cut_off = right.add_collection(LineCollection([], colors=COLOURS["orange"], lw=2))
        (self.cut,) = right.plot([], [], color=COLOURS["black"], lw=1, ls="--")
        self.right = right
        return fig, [*self.images, *self.titles, self.kept, self.cut_off, self.cut]

    def update(self, result):
        matrix, product, s = result["matrix"], result["product"], result["singular_values"]
        size, r = len(matrix), result["parameters"] // (2 * len(matrix))
        reach = matrix.abs().max().item() / 2  # a few weights go beyond it, and all others show more of themselves
        for image, shown in zip(self.images, (matrix, product, matrix - product), strict=True):
            image.set_data(shown.numpy())
            image.set_clim(-reach, reach)  # one range, so that a pale residual means a small one
        for title, text in zip(self.titles, (f"target {size} x {size}", f"rank {r}", "residual"), strict=True):
            title.set_text(text)
        lines = [[(k, 0), (k, value)] for k, value in enumerate((s / s[0]).tolist(), 1)]
        self.kept.set_segments(lines[:r])
        self.cut_off.set_segments(lines[r:])
        self.cut.set_data([r + 0.5] * 2, [0, 1.05])
        self.right.set_xlim(0.8, 1.2 * size)

    @staticmethod
    def describe(state, result):
        size, parameters = state["size"], result["parameters"]
        return (
            f"{size} x {size}, decay {state['decay']:g}, r={state['r']}: {parameters:,} parameters, "
            f"{100 * parameters / size**2:.0f} % of {size**2:,}; {100 * result['energy']:.1f} % of the energy, "
            f"relative error {100 * result['relative_error']:.1f} %"
        )
