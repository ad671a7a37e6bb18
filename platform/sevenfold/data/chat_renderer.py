"""Renders conversations with the chat template of a tokenizer."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sevenfold.data.chat_layout import Layout, check_complete, layout_of, mark_pieces
from sevenfold.data.sources.documents import UnusableExampleError
from sevenfold.data.sources.messages import Conversation
from sevenfold.data.template_errors import describe, is_fault_of_template, template_line
from sevenfold.data.template_limits import limit_transformers
from sevenfold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The chat template of `tokenizer.chat_template: plain`. It has no special tokens that the model
# would have to learn first.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message['role'] }}: "
    "{{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '' }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# The names under which transformers gives reasoning to a template.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Formats of dates are short; without the limit, the search of some text takes time by its square.
_STRFTIME = re.compile(r"""strftime_now\(\s{0,20}(["'])(.{0,200}?)\1\s{0,20}\)""")


class ChatRenderer:
    """A tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        today: The date (ISO 8601) that a template which writes the date gets. Default: the current
            date.

    Attributes:
        source: The template, in which the date is written out.
        special_tokens: The tokenizer's special tokens, by their names, such as eos_token.

    Raises:
        InputError: The tokenizer has no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, today: str | None = None):
        day = datetime.fromisoformat(today) if today else datetime.now()
        source = template_source(tokenizer)
        self._name = _template_name(tokenizer, source)
        # the date does not change while a run trains
        self.source = _STRFTIME.sub(lambda m: repr(day.strftime(m[2])), source)
        self.special_tokens = {
            name: str(token)
            for name, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """Returns the text of a conversation.

        Args:
            conversation: The conversation.
            add_generation_prompt: Whether to add what comes before a reply.

        Raises:
            UnusableExampleError: The template rejects the conversation, or does not use all of it.
            InputError: It is not a template, or takes too much time or memory.
        """
        return str(self._rendered(conversation, add_generation_prompt, False)[0][0])

    @property
    def marks_replies(self) -> bool:
        """Whether the template itself marks what is generated, by `{% generation %}`."""
        return re.search(r"\{%-?\s*generation", self.source) is not None

    def generation_marks(self, conversation: Conversation) -> list[tuple[int, int]]:
        """Returns the start and end of each text that the template marks as generated."""
        return self._rendered(conversation, False, True)[1][0]

    def layout(self, conversation: Conversation, add_generation_prompt: bool = False) -> Layout:
        """Returns the layout: the template rendered with a marker in place of each piece.

        Raises:
            UnusableExampleError: The template leaves out what was said; it may leave out reasoning.
        """
        layout = self._cached_layout(mark_pieces(conversation).dump(), add_generation_prompt)
        check_complete(layout, conversation)
        return layout

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _cached_layout(self, skeleton: str, add_generation_prompt: bool) -> Layout:
        return layout_of(self.render(Conversation.load(skeleton), add_generation_prompt))

    @functools.lru_cache(maxsize=4096)  # noqa: B019
    def header_after(self, roles: tuple[str, ...]) -> str:
        """Returns what the template writes to ask for a reply after messages with these roles."""
        chat = Conversation([{"role": r, "content": f"{r} {i}"} for i, r in enumerate(roles)])
        try:
            closed, opened = self.render(chat), self.render(chat, True)
        except UnusableExampleError:  # such as for messages of tools without a call
            return ""
        return opened[len(closed) :] if opened.startswith(closed) else ""

    def _rendered(
        self, conversation: Conversation, add_generation_prompt: bool, marks: bool
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        # imported here because it imports torch, which other encoders do without
        from transformers.utils.chat_template_utils import render_jinja_template

        limit_transformers()
        given = {
            key for m in conversation.messages for key in m.keys() - {"role", "content", "train"}
        }
        for key in sorted(given | ({"tools"} if conversation.tools else set())):
            names = _REASONING if key == "reasoning_content" else (key,)
            if not any(name in self.source for name in names):
                raise UnusableExampleError(
                    f"the chat template does not use {key!r}, which is given: choose another "
                    "template (tokenizer.chat_template), or name it in data.ignore_columns"
                )
        messages = [
            {key: value for key, value in message.items() if key != "train"}
            for message in conversation.messages
        ]
        try:
            rendered: Any = render_jinja_template(
                [messages],
                tools=conversation.tools,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marks,
                **self.special_tokens,
            )
        except Exception as e:  # a template can raise anything that Python can
            where = f"{self._name}: line {template_line(e)}"
            if is_fault_of_template(e):
                raise InputError(
                    f"{where}: expected a chat template that can be rendered, found one that "
                    f"cannot: {describe(e)}: use another (tokenizer.chat_template)"
                ) from None
            start = json.dumps(messages[0], ensure_ascii=False)[:80] if messages else "nothing"
            raise UnusableExampleError(
                f"the tokenizer's chat template rejects the conversation that begins {start}: "
                f"{describe(e)} ({where})"
            ) from None
        return rendered


def _template_name(tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    """Returns the file that a tokenizer's chat template is from, for messages."""
    folder = str(tokenizer.name_or_path or "the tokenizer")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = os.path.join(folder, name)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = Path(path).read_text(encoding="utf-8")
            if text == source or (name.endswith(".json") and "chat_template" in text):
                return f"{path}: chat_template" if name.endswith(".json") else path
    return f"{folder}: the chat template"


def template_source(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the chat template of a tokenizer; of several, the one named `default`.

    Raises:
        InputError: There is none.
    """
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise InputError(
                f"the tokenizer has the chat templates {', '.join(sorted(template))} and none "
                "named default: choose one with tokenizer.chat_template: NAME"
            )
        template = template["default"]
    if not template:
        raise no_template_error()
    return str(template)


def no_template_error() -> InputError:
    """Returns the error for conversations without a chat template."""
    return InputError(
        "conversations need a chat template, and the tokenizer has none: set "
        "tokenizer.chat_template (`plain` or a file), or use data with the columns prompt and "
        "completion"
    )
