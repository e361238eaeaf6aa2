"""Check a run before its model is loaded: a typo should not cost a minute.

Settings checks itself when it is made; add_lora checks the names of layers, which only a model has.
"""

from qlora_lab.adapters.lora import check_strength
from qlora_lab.quant.blocks import check_block_size
from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.numbers import check_whole
from qlora_lab.train.run_options import AdapterOptions, ModelOptions


def check_run(model: ModelOptions, adapter: AdapterOptions, *, held_out: int = 0, resume: bool | int = False) -> None:
    """Raise ValueError for the first option that is not allowed, before anything is loaded.

    held_out: number of examples to test on. resume: a step, or whether to resume at all.
    """
    check_strength(adapter.alpha, adapter.dropout)
    if model.codebook != "none":  # none: the weights stay as they are
        codebook(model.codebook)
    check_block_size(model.block_size)
    check_whole("r", adapter.r)
    check_whole("held-out", held_out, 0)
    if not isinstance(resume, bool):  # True and False are no steps, though Python counts with them
        check_whole("resume", resume)
