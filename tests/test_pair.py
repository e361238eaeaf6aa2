"""Whatever takes a model and a tokenizer names what it got instead, before anything else."""

import pytest
import torch

import qlora_lab as ql
from qlora_lab.infer.chat import Chat
from qlora_lab.measure.multiple_choice import choice_scores

CALLS = {
    "decode": lambda *pair: ql.decode(*pair, "a"),
    "Decoding": lambda *pair: ql.Decoding(*pair, "a"),
    "Chat": Chat,
    "ChatPanel": ql.ChatPanel,
    "generate": lambda *pair: ql.generate(*pair, "a"),
    "held_out": lambda *pair: ql.held_out(*pair, []),
    "perplexity": lambda *pair: ql.perplexity(*pair, "a text"),
    "choice_scores": lambda *pair: choice_scores(*pair, None),
    "Training": ql.Training,
    "finetune": ql.finetune,
    "diagnose": ql.diagnose,
    "sensitivity": lambda *pair: ql.sensitivity(*pair, "a text"),
}
ALONE = {
    "add_lora": ql.add_lora,
    "add_adapter": ql.add_adapter,
    "save_adapter": lambda model: ql.save_adapter(model, "never written"),
    "load_adapter": lambda model: ql.load_adapter(model, "never read"),
    "remove_adapter": ql.remove_adapter,
    "AdapterBank": ql.AdapterBank,
    "measure_memory": ql.measure_memory,
    "sensitivity": lambda model: ql.sensitivity(model, None, []),
}
MODELS = {
    "a name": ("smollm2-135m", "model is 'smollm2-135m', not a model"),
    "nothing": (None, "model is None, not"),
    "what load returns": (("model", "tokenizer"), "model is .'model', 'tokenizer'., not"),
    "a layer": (torch.nn.Linear(2, 2), "model is a Linear, not"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("model, message", MODELS.values(), ids=MODELS)
def test_what_is_no_model(call, model, message, tokenizer):
    with pytest.raises(TypeError, match=message + r".*give what load returns, model, tokenizer = qlora_lab.load"):
        call(model, tokenizer)


@pytest.mark.parametrize("call", ALONE.values(), ids=ALONE)
@pytest.mark.parametrize("name", ["a name", "nothing", "what load returns"])
def test_what_takes_a_model_alone(call, name):
    model, message = MODELS[name]
    with pytest.raises(TypeError, match=message):
        call(model)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("other", [None, "smollm2-135m", torch.nn.Linear(2, 2)])
def test_what_is_no_tokenizer(call, other, tiny_llama):
    with pytest.raises(TypeError, match="tokenizer is .*, not a tokenizer.*give what load returns"):
        call(tiny_llama, other)
