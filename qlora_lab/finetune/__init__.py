"""The finetune room: a model in, an adapter out. Read it in this order:

fetch -> gguf_convert -> linear4bit -> models -> lora -> examples, docstrings, data, batches -> loss ->
settings -> trainer -> checkpoint, peft_format

The room can be called: `qlora_lab.finetune(model, tokenizer, ...)` is `finetune.trainer.finetune`. The library's main
verb and this folder share a name, and importing anything from the folder would otherwise hide the verb.
"""

import sys
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class _CallableRoom(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any):
        from qlora_lab.finetune.trainer import finetune

        return finetune(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:  # what Shift-Tab shows in a notebook
        from qlora_lab.finetune.trainer import finetune

        return signature(finetune)


sys.modules[__name__].__class__ = _CallableRoom
