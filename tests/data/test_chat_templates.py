"""Chat templates: the ids are those of transformers, and the targets are what the assistant says.

The public templates are those of the package `axolotl` (Apache-2.0), which is downloaded once per
machine; the tests that need it are skipped where it cannot be had.
"""

import itertools
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers import tiny_models
from helpers.packages import package_files
from transformers import PreTrainedTokenizerFast

from sevenfold.data.chat_renderer import PLAIN_TEMPLATE, template_source
from sevenfold.data.chat_template import ChatTemplate, reply_end_tokens
from sevenfold.data.examples import ConversationEncoder, PreferenceEncoder
from sevenfold.data.sources.documents import (
    BadDocumentsError,
    Documents,
    Skipped,
    UnusableExampleError,
)
from sevenfold.data.sources.messages import Conversation, Message, pair
from sevenfold.errors import InputError

# The spelling of special tokens in templates.
SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<\uff5c[^\uff5c]{1,40}\uff5c>|<[A-Z_]{3,30}>|</?s>|<(?:start|end)_of_turn>|<turn\|>"
    r"|<\|turn>|\[/?INST\]|\[\|[a-z]+\|\]|\[/?SYSTEM_PROMPT\]|\[/?TOOL_[A-Z]+\]"
)
# Templates that cannot be trained on as they are, each with the reason.
REFUSED = {
    "llava": "no special token",  # it ends a reply with a line break
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text: str, **keys: Any) -> Message:
    return {"role": "user", "content": text, **keys}


def assistant(text: str, **keys: Any) -> Message:
    return {"role": "assistant", "content": text, **keys}


TALK = [
    user("What is 2+2?"),
    assistant("4, of course."),
    user("And 3+3?"),
    assistant("It is 6."),
]


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with this template, which knows the special tokens in it."""
    trained = tiny_models.tokenizer(template)
    special = sorted(set(SPECIAL.findall(template)))
    trained.add_special_tokens({"additional_special_tokens": special})
    return trained


def marked(template: ChatTemplate, messages: list[Message]) -> str:
    """Returns the rendered text with the targets between brackets."""
    text, _, replies = template.locate(Conversation(messages))
    for span in reversed(replies):
        text = f"{text[: span.start]}⟦{text[span.start : span.stop]}⟧{text[span.stop :]}"
    return text


@pytest.fixture(scope="session")
def public_templates() -> dict[str, str]:
    files = package_files("axolotl", "0.19.0", r"axolotl/utils/chat_templates/templates/.+\.jinja")
    return {Path(name).stem: data.decode() for name, data in files.items()}


def test_public_templates(public_templates: dict[str, str]) -> None:
    """Prints each conversation with its targets: `pytest -s` shows them."""
    trained_on = 0
    for name, source in sorted(public_templates.items()):
        model_tokenizer = tokenizer(source)
        template = ChatTemplate(model_tokenizer)
        if name in REFUSED:
            with pytest.raises((InputError, UnusableExampleError), match=REFUSED[name]):
                template.end_tokens()
            continue
        text = marked(template, TALK)
        print(f"{name}: {text!r}")
        # All that the assistant says is a target, and nothing that the user says.
        targets = "".join(re.findall("⟦(.*?)⟧", text, re.DOTALL))
        assert all(m["content"] in targets for m in TALK if m["role"] == "assistant"), name
        assert not any(m["content"] in targets for m in TALK if m["role"] == "user"), name
        # The last reply ends with the token that ends the generation.
        (end,) = template.end_tokens()
        assert text.rpartition("⟧")[0].endswith(model_tokenizer.convert_ids_to_tokens(end)), name
        ids, is_target = template.ids_and_targets(Conversation(TALK))
        expected = model_tokenizer.apply_chat_template(TALK, tokenize=True)
        assert ids == expected["input_ids"], name
        decoded = model_tokenizer.decode(np.array(ids)[is_target].tolist())
        assert decoded.replace(" ", "") == targets.replace(" ", ""), name
        trained_on += 1
    assert trained_on >= 15


QWEN3 = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set reasoning, content = '', m.content %}"
    "{%- if m.reasoning_content %}{%- set reasoning = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n' + reasoning + '\n</think>\n\n' }}{%- endif %}"
    "{{- content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if tools %}{{- tools | tojson }}{%- endif %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# merges the system message into the last message of the user, as Mistral's do
SYSTEM_LAST = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}[INST] "
    "{{ ns.system if loop.index0 >= messages|length - 2 else '' }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}assistant: "
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        # a template that renders an earlier reply differently once others follow
        (
            QWEN3,
            TALK,
            "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
            "⟦4, of course.<|im_end|>⟧\n<|im_start|>user\nAnd 3+3?<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is 6.<|im_end|>⟧\n",
        ),
        (
            QWEN3,
            [
                user("a"),
                assistant("<think>\none\n</think>\n\ntwo"),
                user("b"),
                assistant("<think>\nthree\n</think>\n\nfour"),
            ],
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦two<|im_end|>⟧\n"
            "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\nthree\n</think>\n\nfour<|im_end|>⟧\n",
        ),
        (
            QWEN3,
            [user("a"), assistant("6", reasoning_content="a simple sum")],
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\na simple sum\n</think>\n\n6<|im_end|>⟧\n",
        ),
        (
            QWEN3,
            [
                user("weather?"),
                assistant("", tool_calls=[{"function": {"name": "look", "arguments": {"x": 1}}}]),
                user("well?"),
                assistant("sun"),
            ],
            "<|im_start|>user\nweather?<|im_end|>\n<|im_start|>assistant\n"
            '⟦<tool_call>{"name": "look", "arguments": {"x": 1}}</tool_call><|im_end|>⟧\n'
            "<|im_start|>user\nwell?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n\n</think>\n\nsun<|im_end|>⟧\n",
        ),
        (
            SYSTEM_LAST,
            [{"role": "system", "content": "Be brief."}, *TALK],
            "<|bos|>[INST] What is 2+2? [/INST] ⟦4, of course.<|eos|>⟧[INST] Be brief.\n\nAnd 3+3? "
            "[/INST] ⟦It is 6.<|eos|>⟧",
        ),
        (MARKS, TALK[:2], "user: What is 2+2?\nassistant: ⟦4, of course.<|eos|>⟧"),
        # texts that occur in the template itself, and in each other
        (
            PLAIN_TEMPLATE,
            [user("assistant:"), assistant("user: a"), user("a"), assistant("assistant")],
            "<|bos|>user: assistant:\nassistant:⟦ user: a<|eos|>⟧\nuser: a\n"
            "assistant:⟦ assistant<|eos|>⟧\n",
        ),
    ],
)
def test_templates_that_look_at_other_messages(
    template: str, messages: list[Message], expected: str
) -> None:
    model_tokenizer = tokenizer(template)
    chat = ChatTemplate(model_tokenizer)
    assert marked(chat, messages) == expected
    ids, targets = chat.ids_and_targets(Conversation(messages))
    plain = [{k: v for k, v in m.items() if k != "train"} for m in messages]
    assert ids == model_tokenizer.apply_chat_template(plain, tokenize=True)["input_ids"]
    assert any(targets) and not all(targets)


def test_a_reply_without_weight_is_no_target() -> None:
    chat = ChatTemplate(tokenizer(CHATML))
    messages = [user("2+2?"), assistant("5", train=False), user("again"), assistant("4")]
    ids, targets = chat.ids_and_targets(Conversation(messages))
    learned = chat_tokens(tokenizer(CHATML), ids, targets)
    assert learned == "4<|im_end|>"


def chat_tokens(model_tokenizer: Any, ids: list[int], targets: list[bool]) -> str:
    return str(model_tokenizer.decode([i for i, t in zip(ids, targets, strict=True) if t]))


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        ("{{ raise_exception('no system here') }}", TALK, "begins .*2.2.*: no system here"),
        (
            CHATML.replace("m.content", "m.content | upper"),
            TALK,
            "changes what was|leaves out",
        ),
        (CHATML, [user("a"), assistant("b", tool_calls=[{"function": {"name": "f"}}])], "tool_cal"),
        (CHATML, [user("a"), assistant("b", reasoning_content="c")], "reasoning_content"),
        (
            QWEN3,
            [
                user("a"),
                assistant(
                    "", tool_calls=[{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]
                ),
            ],
            r"'<\|im_end\|>', which is a special token",
        ),
        (
            MARKS.replace(
                "{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"
            ),
            TALK,
            "{% gen",
        ),
        (
            "{% for m in messages[-1:] %}{{ m.content }}{{ eos_token }}{% endfor %}",
            TALK,
            "leaves out message 1",
        ),
    ],
)
@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_an_unusable_row_is_named_or_skipped(
    template: str, messages: list[Message], reason: str, on_bad: Any
) -> None:
    fields = [pa.array([Conversation(messages).dump()] * 2, pa.large_string())]
    documents = Documents(
        fields, np.array([3, 5]), Skipped(), locate=lambda i: f"line {i}", path="x.jsonl"
    )
    documents.on_bad = on_bad
    encoder = ConversationEncoder(tokenizer(template), 100)
    if on_bad == "error":
        with pytest.raises(BadDocumentsError, match=rf"x\.jsonl: line 3: .*{reason}"):
            encoder.encode([documents])
    else:
        (encoded,) = encoder.encode([documents])
        assert encoded.skipped.count == 2 and "line 3" in encoded.skipped.first
        assert len(encoded.origin) == 0 and len(encoded.ids) == 0


def test_a_template_without_an_end_is_refused_once() -> None:
    encoder = ConversationEncoder(
        tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"), 100
    )
    fields = [pa.array([Conversation(TALK).dump()] * 2, pa.large_string())]
    documents = Documents(fields, np.arange(2), Skipped(), on_bad="skip")
    with pytest.raises(InputError, match=r"^the chat template ends a reply with no special token"):
        encoder.encode([documents])


def test_a_template_for_a_single_exchange() -> None:
    single = "{{ raise_exception('one turn') if messages|length > 2 }}" + CHATML
    assert marked(ChatTemplate(tokenizer(single)), TALK[:2]).endswith("⟦4, of course.<|im_end|>⟧\n")


def test_a_special_tokens_spelling_in_a_message_stays_text() -> None:
    """Property: with any texts, the only special tokens are those of the template."""
    model_tokenizer = tokenizer(CHATML)
    chat = ChatTemplate(model_tokenizer)
    special = set(model_tokenizer.all_special_ids)
    rng = random.Random(0)
    alphabet = [
        *model_tokenizer.all_special_tokens,
        "a",
        " ",
        "\n",
        "é",
        "中",
        "<|",
        "|>",
        "im_end",
    ]
    for _ in range(200):
        texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 8))) + "." for _ in range(4)]
        roles = ("user", "assistant", "user", "assistant")
        messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        ids, _ = chat.ids_and_targets(Conversation(messages))
        assert sum(i in special for i in ids) == 2 * len(messages)
        assert model_tokenizer.decode(ids) == "".join(
            f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages
        )
        question = chat.ids(Conversation(messages[:3]), add_generation_prompt=True)
        assert sum(i in special for i in question) == 2 * 3 + 1


def test_the_end_of_a_reply_ends_a_generation() -> None:
    model_tokenizer = tokenizer(CHATML)
    assert model_tokenizer.convert_ids_to_tokens(reply_end_tokens(model_tokenizer)) == [
        "<|im_end|>"
    ]
    assert reply_end_tokens(tokenizer("{{ messages[0].content }}")) == []
    without: Any = tokenizer(CHATML)
    without.chat_template = None
    assert reply_end_tokens(without) == []


def test_of_several_templates_the_default_is_used() -> None:
    several: Any = tokenizer(CHATML)
    several.chat_template = {"default": CHATML, "tool_use": "{{ messages }}"}
    assert template_source(several) == CHATML
    several.chat_template = {"rag": CHATML, "tool_use": CHATML}
    with pytest.raises(InputError, match=r"rag, tool_use.*tokenizer\.chat_template"):
        ConversationEncoder(several, 64).question(Conversation(TALK[:1]))


def test_the_date_is_that_of_the_start_of_the_run() -> None:
    dated: Any = tokenizer("{{ strftime_now('%d %b %Y') }}" + CHATML)
    encoders = [ConversationEncoder(dated, 400, today=day) for day in ("2026-01-31", "2026-02-01")]
    texts = [dated.decode(e.question(Conversation(TALK[:1]))) for e in encoders]
    assert texts[0].startswith("31 Jan 2026<|im_start|>") and texts[1].startswith("01 Feb 2026")
    assert encoders[0].identity() != encoders[1].identity()
    undated = [ConversationEncoder(tokenizer(CHATML), 9, today=day) for day in ("2026-01-31", None)]
    assert undated[0].identity() == undated[1].identity()


@pytest.mark.parametrize("room", [30, 60, 90, 200])
@pytest.mark.parametrize(
    "prompt",
    [Conversation([*TALK, user("third question")]), pair("a long prompt 0123456789 " * 4)],
)
def test_both_answers_of_a_preference_have_the_same_prompt(prompt: Conversation, room: int) -> None:
    model_tokenizer = tokenizer(CHATML)
    encoder = PreferenceEncoder(model_tokenizer, 2 * room)
    chosen, rejected = ("ok " * 14).strip(), "no"
    ids, targets, _ = encoder._example(prompt.dump(), chosen, rejected)
    edges = [0, *(np.flatnonzero(np.diff(targets)) + 1), len(ids)]
    runs = [ids[a:b] for a, b in itertools.pairwise(edges)]
    assert len(ids) <= 2 * room and len(runs) == 4
    assert runs[0] == runs[2], model_tokenizer.decode(ids)
    assert model_tokenizer.decode(runs[3]).startswith("no")
