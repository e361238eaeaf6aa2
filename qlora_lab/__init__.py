"""qlora_lab: see how QLoRA works, down to the byte, then use it.

The names below are the public ones; everything else is imported from its room: `from qlora_lab.quant.packing import
pack`. Each is loaded when it is first used, so that `import qlora_lab` is instant: torch alone takes over a second.
"""

from importlib import import_module
from typing import Any

_HOME = {
    # quant: numbers
    "codebook": "quant.codebook",
    "normal_float": "quant.codebook",
    "quantize": "quant.quantize",
    "dequantize": "quant.quantize",
    "QuantizedTensor": "quant.quantize",
    # data: examples, tokens, labels
    "load_data": "data.dataset",
    "show_labels": "data.dataset",
    # model: a folder in 4 bits
    "fetch": "model.fetch",
    "load": "model.load",
    "quantize_folder": "model.quantized_folder",
    # adapters: what is trained
    "add_lora": "adapters.lora",
    "add_adapter": "adapters.add_adapter",
    "save_adapter": "adapters.peft_format",
    "load_adapter": "adapters.peft_format",
    "remove_adapter": "adapters.adapter",
    "AdapterBank": "adapters.many",
    # optim: where the moments lie
    "PagedAdamW": "optim.paged_adamw",
    # train, and the checks before it
    "finetune": "train.trainer",
    "Training": "train.trainer",
    "Settings": "train.settings",
    "diagnose": "doctor.diagnose",
    # infer: answers from packed weights
    "decode": "infer.decode",
    "Decoding": "infer.decode",
    "Sampling": "infer.sampling",
    # export: a model without its adapter
    "merge": "export.merge",
    "to_gguf": "export.gguf_out",
    # measure: what a model is worth
    "perplexity": "measure.perplexity",
    "generate": "measure.held_out",
    "generate_routed": "measure.routed",
    "held_out": "measure.held_out",
    "sweep": "measure.sweep",
    "read_results": "files.results_file",
    "sensitivity": "measure.sensitivity",
    "published_nf4": "measure.published",
    # memory: what a run costs
    "predict_memory": "memory.predict",
    "measure_memory": "memory.measured",
    "fit": "memory.fit",
    "replay_published": "memory.published",
    # exercises and show: for notebooks
    "check": "exercises.check",
    "guess": "exercises.guess",
    "live": "show.live",
    "ChatPanel": "show.chat_panel",
    "FollowWeight": "show.follow_weight",
    "picture": "show.figure",
    "show_source": "show.source",
}
_ROOMS = [
    "files",
    "kernels",
    "quant",
    "data",
    "model",
    "adapters",
    "optim",
    "train",
    "infer",
    "export",
    "doctor",
    "measure",
    "memory",
    "gpu_code",
    "show",
    "exercises",
    "cli",
]
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"qlora_lab.{_HOME[name]}"), name)
        globals()[name] = value  # the next use does not come here
        return value
    if name in _ROOMS:
        return import_module(f"qlora_lab.{name}")
    raise AttributeError(f"qlora_lab has no {name!r}: its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
