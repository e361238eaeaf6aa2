"""Count the operations of reading a row of tokens: what each method adds to the base's, by formula.

    work(shape_of("llama-7b"), Setup(method="houlsby"), tokens=64)

In: a Shape and a Setup. Out: multiplications and additions of all products, as torch's FlopCounterMode counts them with
eager attention. A merged LoRA is the base: nothing_added counts it.
Source: LoRA section 3 (no additional inference latency) and table 1; prefix tuning section 4.2.

Operations are no seconds: a small product beside a large one, or after it, has to be started too, and on a short row
that costs more than its operations. Not here: a vision tower, seconds (measure/latency.py), bytes (predict.py).
"""

from dataclasses import replace

from qlora_lab.memory.setup import VIRTUAL, Setup
from qlora_lab.memory.shape import Shape
from qlora_lab.memory.targets import targeted


def work(shape: Shape, setup: Setup, tokens: int) -> int:
    """Count the operations of reading `tokens` tokens of one row, up to the logits of the last one.

    Raises ValueError for a target that the model does not have.
    """
    # a prompt passes through the layers as words do; a prefix is looked at, and computes nothing
    read = tokens + setup.virtual_tokens * (setup.method == "prompt")  # go through all layers
    keys = tokens + setup.virtual_tokens * (setup.method in VIRTUAL)  # attention looks at them
    weights = sum(linear.numel for linear in shape.linears) + _beside(shape, setup)
    weights += shape.router + shape.experts_per_token * sum(matrix.numel for matrix in shape.expert)
    attention = 2 * shape.query * keys  # for a token: its scores, and the mean of the values
    return 2 * read * shape.layers * (weights + attention) + 2 * shape.table  # the head sees one token


def nothing_added(shape: Shape, setup: Setup, tokens: int) -> int:
    """Count the operations of the base, which are those of a merged LoRA, of full fine-tuning and of biases, too."""
    # its weights are others, and as many
    return work(shape, replace(setup, method="full"), tokens)


def _beside(shape: Shape, setup: Setup) -> int:
    """Elements of the matrices in one layer that the method adds to the products of each token."""
    if setup.method == "houlsby":  # down and up, after attention and after the feed-forward part
        return 2 * 2 * setup.size * shape.hidden
    linears, experts = targeted(shape, setup)
    used = [*linears, *shape.experts_per_token * experts]  # the pairs of the experts that a token is routed to
    return sum(setup.r * (matrix.in_features + matrix.out_features) for matrix in used)
