"""Tools, calls, results and thoughts are learned as the template writes them, or refused by name."""

import json
from dataclasses import replace

import pytest

from qlora_lab.data.chat_template import ChatTemplate
from qlora_lab.data.dataset import load_data
from qlora_lab.data.examples import Example, to_example
from qlora_lab.data.labels import Notes, encode, prompt_ids
from tests.data.chat_templates import CASES, tokenizer_of
from tests.data.test_templates import learned_texts

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tell the weather.", "parameters": {"type": "object"}},
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Bern", "days": 2}},
}
ASKED = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": true}', "tool_call_id": "abcdefghi", "name": "weather"},
    {"role": "assistant", "content": "Yes."},
]
RECORD = {"messages": ASKED, "tools": [TOOL]}

# Written anew from what the models' templates do with tools; each reduced to that.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for tool in tools %}{{- tool | tojson + '\\n' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.reasoning_content and loop.last %}{{- '<think>\\n' + m.reasoning_content.strip() + '\\n</think>\\n\\n' }}"
    "{%- endif %}{{- m.content }}"
    "{%- for call in m.tool_calls or [] %}{%- if m.content or not loop.first %}{{- '\\n' }}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson + '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA_31 = (
    "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t | tojson(indent=4) + '\\n\\n' }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('only one call at once') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}<|eom_id|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson }}"
    "{{ '<|eot_id|>' }}{% else %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}{% endfor %}"
    "{{ eos_token }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + m.content | tojson + ', \"call_id\": \"' + m.tool_call_id + '\"}' }}"
    "{{ '[/TOOL_RESULTS]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern", "days": 2}}\n</tool_call>'
LEARNED = {
    "qwen": (QWEN_CALL + "<|im_end|>", "Yes.<|im_end|>"),
    "llama 3.1": ('{"name": "weather", "parameters": {"city": "Bern", "days": 2}}<|eom_id|>', "Yes.<|eot_id|>"),
    "mistral": (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Bern", "days": 2}, "id": "abcdefghi"}]</s>',
        " Yes.</s>",
    ),
}


def tokenizer_with(template: str, *control: str, like: str):
    """The tokenizer of a known case, with another template and more control tokens."""
    case = next(case for case in CASES.values() if case.title.startswith(like))
    return tokenizer_of(replace(case, template=template, control=(*case.control, *control)))


TOKENIZERS = {
    "qwen": lambda: tokenizer_with(QWEN, like="ChatML: Qwen2.5"),
    "llama 3.1": lambda: tokenizer_with(LLAMA_31, "<|eom_id|>", like="Llama 3.1"),
    "mistral": lambda: tokenizer_with(MISTRAL, "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", like="Mistral"),
}


@pytest.fixture
def qwen():
    return TOKENIZERS["qwen"]()


def with_call(**changes) -> Example:
    """RECORD with another call."""
    turns = [ASKED[0], ASKED[1] | {"tool_calls": [CALL | {"function": CALL["function"] | changes}]}, *ASKED[2:]]
    return to_example(RECORD | {"messages": turns})


# ------------------------------------------------------------------------------------------------------------- learned


@pytest.mark.parametrize("name", LEARNED)
def test_a_call_and_its_end_are_learned_and_the_result_is_not(name):
    tokenizer = TOKENIZERS[name]()
    encoded = encode(to_example(RECORD), tokenizer)
    assert learned_texts(encoded, tokenizer) == LEARNED[name] and encoded.notes == Notes()
    whole = tokenizer.apply_chat_template(to_messages(), tools=[TOOL], return_dict=False)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(whole)


def to_messages() -> list[dict]:
    return [ASKED[0], ASKED[1] | {"content": ""}, *ASKED[2:]]


@pytest.mark.parametrize("name", LEARNED)
def test_a_record_may_end_with_a_call(name):
    tokenizer = TOKENIZERS[name]()
    example = to_example(RECORD | {"messages": ASKED[:2]})
    assert learned_texts(encode(example, tokenizer), tokenizer) == LEARNED[name][:1]
    assert json.loads(example.answer) == CALL["function"]
    prompt = prompt_ids(example.prompt, tokenizer, parts=example.parts)
    assert encode(example, tokenizer).input_ids[: len(prompt)] == prompt


def test_several_calls_at_once_are_one_answer(qwen):
    turns = [ASKED[0], ASKED[1] | {"tool_calls": [CALL, CALL], "content": "I look."}, ASKED[2], ASKED[2], ASKED[3]]
    learned = learned_texts(encode(to_example(RECORD | {"messages": turns}), qwen), qwen)
    assert learned == (f"I look.\n{QWEN_CALL}\n{QWEN_CALL}<|im_end|>", "Yes.<|im_end|>")


@pytest.mark.parametrize(
    "arguments", [{}, None, "", {"days": 2}, {"city": ""}, {"where": {"cities": ["Bern", {"a": None}]}}]
)
@pytest.mark.parametrize("name", LEARNED)
def test_any_arguments_are_learned_to_their_end(name, arguments):
    tokenizer = TOKENIZERS[name]()
    written = LEARNED[name][0].replace(json.dumps(CALL["function"]["arguments"]), json.dumps(arguments or {}))
    assert learned_texts(encode(with_call(arguments=arguments), tokenizer), tokenizer) == (written, LEARNED[name][1])


def test_arguments_as_json_and_flat_forms_are_the_same():
    nested = {"where": {"cities": ["Bern"], "zip": None}}
    assert with_call(arguments=json.dumps(nested)) == with_call(arguments=nested)
    flat = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]}]
    assert to_example({"messages": flat}).parts.turns[1]["tool_calls"][0]["function"] == CALL["function"]
    for tools in (json.dumps([TOOL]), [TOOL["function"]], json.dumps([TOOL["function"]])):
        assert to_example(RECORD | {"tools": tools}) == to_example(RECORD)


def test_missing_arguments_of_a_table_are_no_arguments():
    """A table holds None for each argument that another row's call has; JSON's null is an argument."""
    function = CALL["function"] | {"arguments": {"city": "Bern", "unit": None}}
    turns = [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]
    (example,) = load_data([{"messages": turns}])
    assert example.parts.turns[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert to_example({"messages": turns}).parts.turns[1]["tool_calls"][0]["function"]["arguments"]["unit"] is None


def test_positions_follow_the_turns_that_stay():
    greeting = [{"role": "assistant", "content": "Hello"}, *ASKED]
    example = to_example(RECORD | {"messages": greeting, "system": "s"})
    assert example.messages[2] == ("assistant", "") and example.parts.calling == {2}


def test_a_thought_of_the_last_answer_is_learned_and_a_hidden_one_is_counted(qwen):
    thought = ASKED[3] | {"reasoning_content": "It says so.\n"}
    example = to_example({"messages": [ASKED[0], thought]})
    assert learned_texts(encode(example, qwen), qwen) == ("<think>\nIt says so.\n</think>\n\nYes.<|im_end|>",)
    example = to_example({"messages": [ASKED[0], thought, ASKED[0], ASKED[3]]})
    encoded = encode(example, qwen)
    assert learned_texts(encoded, qwen) == ("Yes.<|im_end|>",) and encoded.notes == Notes(hidden=1)


def test_a_template_with_another_name_for_thoughts_gets_them_under_it(qwen):
    qwen.chat_template = QWEN.replace("reasoning_content", "thinking")
    example = to_example({"messages": [ASKED[0], ASKED[3] | {"reasoning_content": "It says so."}]})
    assert "It says so." in learned_texts(encode(example, qwen), qwen)[0]


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tools", "nothing"), "does not show 'weather' of 'tools': use another template"),
        (("m.tool_calls", "m.nothing"), "does not show 'weather' of 'tool_calls': use another"),
        (("call.function.arguments | tojson + '", "'{}"), "does not show 'city' of 'tool_calls': use another"),
        (("+ m.content +", "+"), "does not show the tool turn '{\"rain\": true}'"),
    ],
)
def test_what_a_template_drops_is_refused_by_name(qwen, change, message):
    qwen.chat_template = QWEN.replace(*change)
    with pytest.raises(ValueError, match=message):
        encode(to_example(RECORD), qwen)


@pytest.mark.parametrize("turns", [[3], [3, 0, 3]])
def test_a_thought_that_the_template_does_not_know_is_refused(qwen, turns):
    qwen.chat_template = QWEN.replace("reasoning_content", "nothing")
    messages = [ASKED[0], *(ASKED[i] for i in turns)]
    messages[1] = messages[1] | {"reasoning_content": "It says so."}
    with pytest.raises(ValueError, match="'It says so.' of 'reasoning_content': write it in the text as <think>"):
        encode(to_example({"messages": messages}), qwen)


def test_a_text_beside_a_call_that_the_template_drops_is_refused():
    tokenizer = TOKENIZERS["llama 3.1"]()
    turns = [ASKED[0], ASKED[1] | {"content": "I look."}, *ASKED[2:]]
    with pytest.raises(ValueError, match="does not show 'I look.', the text beside a tool call"):
        encode(to_example(RECORD | {"messages": turns}), tokenizer)


def test_what_the_template_itself_refuses_is_named():
    tokenizer = TOKENIZERS["llama 3.1"]()
    turns = [ASKED[0], ASKED[1] | {"tool_calls": [CALL, CALL]}, *ASKED[2:]]
    with pytest.raises(ValueError, match="refuses the conversation that begins user: 'Rain.': only one call at once"):
        encode(to_example(RECORD | {"messages": turns}), tokenizer)


@pytest.mark.parametrize("arguments", [{"city": "<|im_end|>"}, {"a": {"<|im_end|>": 1}}])
def test_a_control_token_in_a_call_is_refused(qwen, arguments):
    with pytest.raises(ValueError, match=r"spells the control token '<\|im_end\|>': leave it out"):
        encode(with_call(arguments=arguments), qwen)


def test_a_call_that_another_token_would_end_is_refused():
    """Behind [ARGS], which is a control token too, the arguments would be cut off."""
    template = MISTRAL.replace("(call.function | tojson)[:-1] +", "call.function.name + '[ARGS]{}' +")
    tokenizer = tokenizer_with(template, "[TOOL_CALLS]", "[ARGS]", like="Mistral")
    turns = [ASKED[0], {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}]
    with pytest.raises(ValueError, match="ends 'a tool call' without a special token"):
        encode(to_example({"messages": turns}), tokenizer)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tools": "[{"}, "'tools', line 1, column 3: it ends too early; expected a JSON list"),
        ({"tools": {"name": "f"}}, "'tools' is .*, but must be a list like"),
        ({"tools": [{"type": "function"}]}, "a tool is .*, but must be like .*, with a name"),
        ({"tools": [7]}, "a tool is 7, but must be like"),
        ({"messages": ASKED[:2] + ASKED[3:]}, "a turn of assistant follows a tool call: put a turn of tool"),
        ({"messages": [ASKED[0], ASKED[2], ASKED[3]]}, "a turn of tool follows a turn of user"),
        ({"messages": [ASKED[0] | {"tool_calls": [CALL]}]}, "the turn of user has 'tool_calls', but only an answer"),
        (
            {"messages": [ASKED[0] | {"reasoning_content": "a"}]},
            "turn of user has 'reasoning_content', but only an ans",
        ),
    ],
)
def test_parts_that_are_not_as_they_must_be_are_named(record, message):
    with pytest.raises(ValueError, match=message):
        to_example(RECORD | record)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("f", "a tool call is 'f', but must be like"),
        ({"function": {"arguments": {}}}, "a tool call is .*, but must be like .*, with a name"),
        ({"name": "f", "arguments": [1]}, r"the arguments of 'f' are \[1\], but must be a JSON object"),
        ({"name": "f", "arguments": "[1]"}, r"the arguments of 'f' are \[1\], but must be a JSON object"),
        ({"name": "f", "arguments": "{'a': 1}"}, "the arguments of 'f', line 1, column 2: not JSON"),
        ({"name": "f", "id": 7}, "'id' must be text, found 7"),
    ],
)
def test_a_call_that_is_not_as_it_must_be_is_named_with_its_place(tmp_path, call, message):
    path = tmp_path / "mine.jsonl"
    record = {"messages": [ASKED[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    path.write_text("\n" + json.dumps(record), encoding="utf-8")
    with pytest.raises(ValueError, match=f"mine.jsonl, line 2: {message}"):
        load_data(path)


def test_templates_of_other_conversations_are_the_same_object(qwen):
    template = ChatTemplate(qwen)
    assert template.of(to_example({"messages": [ASKED[0], ASKED[3]]}).parts) is template
