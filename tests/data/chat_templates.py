"""Chat templates of today, each reduced to what it does to the turns, and what is learned under it, found by hand.

In: nothing. Out: CASES, a template, its control tokens, and for three conversations the texts that are to be learned;
`tokenizer_of`, a tokenizer for one of them, with a token a byte.
Written anew from the behaviour of the models' templates: headers, ends, what is trimmed, cut, moved or refused.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_lab.data.examples import Example

QUESTION = ("user", "2 + 2?")
ONE = Example((QUESTION, ("assistant", "4")))
SEVERAL = Example((QUESTION, ("assistant", "4"), ("user", "And 3?"), ("assistant", "7")))
FIRST_THOUGHT, SECOND_THOUGHT = "<think>\nTwo twos.\n</think>\n\n4", "<think>\nFour and three.\n</think>\n\n7"
THOUGHTS = Example((QUESTION, ("assistant", FIRST_THOUGHT), ("user", "And 3?"), ("assistant", SECOND_THOUGHT)))
CONVERSATIONS = {"one": ONE, "several": SEVERAL, "thoughts": THOUGHTS}


@dataclass(frozen=True)
class Case:
    """A template. one, several, thoughts: what is learned of the conversations, in order.

    opening: what a prompt of one question ends with, behind the question. end: the token that ends the last answer.
    hidden, shortened: answers of THOUGHTS that are not shown whole, before the last and the last.
    """

    title: str
    template: str | None
    control: tuple[str, ...]
    opening: str
    end: str
    one: tuple[str, ...]
    several: tuple[str, ...]
    thoughts: tuple[str, ...]
    hidden: int = 0
    shortened: int = 0
    bos: str | None = None
    eos: str | None = None
    lines_apart: bool = False  # line breaks share no token with other white space
    eats_space: bool = False  # control tokens take the white space behind them along
    system: bool = True
    trimmed: Callable[[str], str] = str  # what the template leaves of an answer


def tokenizer_of(case: Case) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a few longer ones of white space, which real vocabularies have as well."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ċ", "ĠĠ"), ("ĠĠ", "ĠĠ")]
    vocabulary = {piece: i for i, piece in enumerate(alphabet + [a + b for a, b in merges])}
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = pre_tokenizers.Split(Regex("\n+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([lines, bytewise]) if case.lines_apart else bytewise
    bpe.decoder = decoders.ByteLevel()
    tokens = [AddedToken(text, special=True, normalized=False, rstrip=case.eats_space) for text in case.control]
    bpe.add_special_tokens(tokens)
    bpe.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    named = {"bos_token": case.bos, "eos_token": case.eos or case.end}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=case.template, **named)


def _same(answer: str) -> dict[str, tuple[str, ...]]:
    """What is learned where each answer is written alike, `answer` with {} for its text."""
    texts = {"one": ("4",), "several": ("4", "7"), "thoughts": (FIRST_THOUGHT, SECOND_THOUGHT)}
    return {kind: tuple(answer.replace("{}", text) for text in learned) for kind, learned in texts.items()}


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% set first = 1 if messages[0].role == 'system' else 0 %}"
    "{% for m in messages[first:] %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{% set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' if first and loop.first else '' %}"
    "{{ bos_token + '[INST] ' + (system + m.content).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% set system = messages[0].content | trim if messages[0].role == 'system' else '' %}"
    "{% set day = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + day + '\\n\\n' + system + '<|eot_id|>' }}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{% set first = 1 if messages[0].role == 'system' else 0 %}{{ bos_token }}"
    "{% for m in messages[first:] %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{% set last = loop.index0 + first >= messages | length - 2 %}"
    "{{ '[INST] ' + (messages[0].content + '\\n\\n' if first and last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN_3 = (
    "{%- set ns = namespace(asked=0) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set thought, said = '', m.content %}"
    "{%- if '</think>' in m.content %}"
    "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.asked and (loop.last or thought) %}{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}"
    "{%- endif %}{{- said + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
QWEN_35 = QWEN_3.replace(
    "if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}",
    "if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}",
)
R1_DISTILL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
GPT_OSS = (
    "{%- macro head() %}{{- 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: medium' }}{%- endmacro %}"
    "{{- '<|start|>system<|message|>' + head() + '<|end|>' }}"
    "{%- for m in messages %}{%- if m.role == 'system' %}"
    "{{- '<|start|>developer<|message|># Instructions\\n\\n' + m.content + '<|end|>' }}"
    "{%- elif m.role == 'user' %}{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{%- else %}{%- if '<|channel|>' in m.content %}{{- raise_exception('channels belong in fields') }}{%- endif %}"
    "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
COHERE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
DEEPSEEK_V3 = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
    "{% for m in messages if m.role != 'system' %}"
    "{{ '<｜User｜>' + m.content if m.role == 'user' else '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
DEEPSEEK_V31 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜></think>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜></think>' }}{% endif %}"
)
SMOLLM_3 = (
    "{{ '<|im_start|>system\\nToday Date: ' + strftime_now('%d %B %Y') + '\\n\\n' }}"
    "{{ messages[0].content if messages[0].role == 'system' else 'You are SmolLM.' }}{{ '<|im_end|>\\n' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GRANITE = (
    "{%- if messages[0].role != 'system' %}{{- '<|start_of_role|>system<|end_of_role|>Today is ' }}"
    "{{- strftime_now('%B %d, %Y') + '.<|end_of_text|>\\n' }}{%- endif %}"
    "{%- for m in messages %}"
    "{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
BEGIN, STOP = DEEPSEEK[:2]
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>")
HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
ROLES = ("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")
FINAL = "<|channel|>final<|message|>{}"

CASES = {
    "chatml": Case(
        "ChatML: Qwen2.5, SmolLM2, Yi", CHATML, IM,
        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", **_same("{}<|im_end|>"),
    ),
    "llama-2": Case(
        "Llama 2", LLAMA_2, ("<s>", "</s>"), " [/INST]", "</s>", **_same(" {} </s>"), bos="<s>", trimmed=str.strip,
    ),
    "llama-3": Case(
        "Llama 3.1 to 3.3", LLAMA_3, HEADERS,
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>", **_same("{}<|eot_id|>"),
        bos="<|begin_of_text|>", trimmed=str.strip, lines_apart=True,
    ),
    "mistral": Case(
        "Mistral v0.3", MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "[/INST]", "</s>", **_same(" {}</s>"), bos="<s>",
    ),
    "gemma": Case(
        "Gemma 1 and 2", GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>", **_same("{}<end_of_turn>"),
        bos="<bos>", eos="<eos>", system=False, trimmed=str.strip,
    ),
    "phi-3": Case(
        "Phi-3, Phi-3.5", PHI_3, ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        "<|end|><|assistant|>", "<|end|>", **_same("{}<|end|>"), eos="<|endoftext|>", eats_space=True,
    ),
    "qwen3": Case(
        "Qwen3", QWEN_3, IM, "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>",
        ("<think>\n\n</think>\n\n4<|im_end|>",),
        ("4<|im_end|>", "<think>\n\n</think>\n\n7<|im_end|>"),
        (SECOND_THOUGHT + "<|im_end|>",), hidden=1,
    ),
    "qwen3.5": Case(
        "Qwen3.5 and others that open a thought and show it", QWEN_35, IM,
        "<|im_end|>\n<|im_start|>assistant\n<think>\n", "<|im_end|>",
        ("\n</think>\n\n4<|im_end|>",),
        ("4<|im_end|>", "\n</think>\n\n7<|im_end|>"),
        (SECOND_THOUGHT.removeprefix("<think>\n") + "<|im_end|>",), hidden=1,
    ),
    "r1-distill": Case(
        "DeepSeek-R1-Distill", R1_DISTILL, DEEPSEEK, "<｜Assistant｜><think>\n", STOP,
        ("4" + STOP,), ("4" + STOP, "7" + STOP), ("\n\n7" + STOP,), hidden=1, shortened=1, bos=BEGIN,
    ),
    "gpt-oss": Case(
        "gpt-oss", GPT_OSS, HARMONY, "<|end|><|start|>assistant", "<|return|>",
        (FINAL.format("4<|return|>"),),
        (FINAL.format("4<|end|>"), FINAL.format("7<|return|>")),
        (FINAL.format(FIRST_THOUGHT + "<|end|>"), FINAL.format(SECOND_THOUGHT + "<|return|>")),
    ),
    "zephyr": Case("Zephyr, TinyLlama", ZEPHYR, ("<s>", "</s>"), "</s>\n<|assistant|>\n", "</s>", **_same("{}</s>")),
    "cohere": Case(
        "Command R", COHERE, (*TURNS, *ROLES),
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>",
        **_same("{}<|END_OF_TURN_TOKEN|>"), bos="<BOS_TOKEN>", trimmed=str.strip,
    ),
    "deepseek-v3": Case(
        "DeepSeek-V3", DEEPSEEK_V3, DEEPSEEK, "<｜Assistant｜>", STOP, **_same("{}" + STOP), bos=BEGIN,
    ),
    "deepseek-v3.1": Case(
        "DeepSeek-V3.1", DEEPSEEK_V31, DEEPSEEK, "<｜Assistant｜></think>", STOP,
        ("4" + STOP,), ("4" + STOP, "7" + STOP), ("\n\n7" + STOP,), hidden=1, shortened=1, bos=BEGIN,
    ),
    "smollm3": Case(
        "SmolLM3 (marks what is generated, headers too)", SMOLLM_3, IM,
        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", **_same("<|im_start|>assistant\n{}<|im_end|>\n"),
        trimmed=lambda answer: answer.lstrip("\n"),
    ),
    "granite": Case(
        "Granite 3", GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>", **_same("{}<|end_of_text|>"),
    ),
    "marked": Case(
        "ChatML with `{% generation %}`, as TRL writes it", MARKED, IM,
        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>", **_same("{}<|im_end|>"),
    ),
    "plain": Case(
        "no template (base models): this library's own", None, ("<s>", "</s>"), "\n\n### Response:\n", "</s>",
        **_same("{}</s>"), bos="<s>",
    ),
}  # fmt: skip
