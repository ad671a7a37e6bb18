"""The commands `generate` and `chat`: text and conversations from a finished model, without Ray."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from sevenfold import storage
from sevenfold.data.examples import ConversationEncoder
from sevenfold.data.sources.messages import Conversation, Message
from sevenfold.engine import decode
from sevenfold.engine.decode import Sampling, generation_config
from sevenfold.errors import InputError
from sevenfold.inference.load import Loaded, load
from sevenfold.report.console import print_text, say


def generate(path: str, prompt: str, sampling: Sampling) -> str:
    """Generates text from a prompt, prints it while it is generated, and returns it.

    A decoder continues [BOS] prompt; an encoder-decoder reads [BOS] prompt EOS, as in training.
    Ctrl-C stops the generation; the text so far is kept.

    Args:
        path: A run or a Hugging Face directory.
        prompt: The prompt.
        sampling: How tokens are chosen.

    Raises:
        InputError: There is no such model, it cannot generate, or the prompt is empty or too long.
    """
    loaded = load(path)
    if loaded.family == "encoder":
        raise InputError(
            f"{loaded.path}: expected a decoder or an encoder-decoder, found an encoder "
            f"({loaded.model.config.model_type}), which cannot generate text: "
            "see sevenfold retrieve and sevenfold inspect"
        )
    ids = loaded.framed(prompt, tail=loaded.family == "encoder-decoder")
    if not ids:
        raise InputError("--prompt: expected text (the tokenizer has no BOS token), found none")
    max_new_tokens = _max_new_tokens(loaded, len(ids), sampling)
    if max_new_tokens < sampling.max_new_tokens:
        say(
            f"generating at most {max_new_tokens:,} tokens: "
            f"the model has only {loaded.positions:,} positions",
            stderr=True,
        )
    torch.manual_seed(sampling.seed)
    with _interruptible() as stop:
        text = _generate(loaded, ids, sampling, stop.is_set)
        print_text("")
    return text


def chat(
    path: str, system: str | None, prompts: Sequence[str] | None, sampling: Sampling
) -> list[Message]:
    """Runs a conversation in the terminal, with the tokenizer's chat template.

    Args:
        path: A run or a Hugging Face directory.
        system: The system message.
        prompts: The user's messages. None: they are read from the terminal.
        sampling: How tokens are chosen.

    Returns:
        All messages of the conversation.

    Raises:
        InputError: The model is not a decoder, its tokenizer has no chat template, the template
            rejects the conversation, or one of `prompts` is longer than the model's positions.
    """
    conversation = ChatSession(load(path), system, sampling)
    if prompts:
        for prompt in prompts:
            print_text(f"> {prompt}")
            conversation.ask(prompt)
    else:
        _read_and_answer(conversation)
    return conversation.messages


class ChatSession:
    """A conversation with a model.

    Args:
        loaded: The model.
        system: The system message.
        sampling: How tokens are chosen.

    Attributes:
        messages: All messages, including those that no longer fit into the model's positions.

    Raises:
        InputError: The model is not a decoder, or its tokenizer has no chat template.
    """

    def __init__(self, loaded: Loaded, system: str | None, sampling: Sampling):
        if loaded.family != "decoder":
            raise InputError(
                f"{loaded.path}: expected a decoder to chat with, found an {loaded.family}: "
                "see sevenfold generate"
            )
        if not loaded.tokenizer.chat_template:
            raise InputError(
                f"{loaded.path}: expected a tokenizer with a chat template, found none: set "
                "tokenizer.chat_template=plain in the recipe of the fine-tuning, or use "
                "sevenfold generate"
            )
        self._loaded, self._system, self._sampling = loaded, system, sampling
        self._encoder = ConversationEncoder(loaded.tokenizer, 1)
        torch.manual_seed(sampling.seed)
        self.restart()

    def restart(self) -> None:
        """Starts a new conversation with the same system message."""
        self.messages: list[Message] = (
            [{"role": "system", "content": self._system}] if self._system else []
        )
        self._dropped = 0  # turns that no longer fit into the model's positions

    def ask(self, text: str) -> str:
        """Prints the answer to a message while it is generated, and returns it.

        Message and answer are added to the conversation; neither is if the message is rejected.

        Raises:
            InputError: The message is too long, or the template rejects the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        positions = self._loaded.positions
        max_prompt_tokens = None
        if positions:
            max_prompt_tokens = positions - min(self._sampling.max_new_tokens, positions // 2)
        ids, dropped = fitted(self._ids, messages, max_prompt_tokens)
        if dropped > self._dropped:
            say(
                f"(the model's {positions:,} positions are full: "
                f"it no longer sees the first {dropped} of your messages)"
            )
        self._dropped = dropped
        self.messages = messages
        with _interruptible() as stop:
            answer = _generate(self._loaded, ids, self._sampling, stop.is_set)
            print_text("\n")
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def save(self, path: str) -> str:
        """Appends the conversation to a JSON lines file, as a row that can be trained on.

        Returns:
            The file and the row's number, for people.
        """
        file = storage.resolve_output(path)
        text = storage.read_text(file) if storage.exists(file) else ""
        if text and not text.endswith("\n"):
            text += "\n"
        row = json.dumps({"messages": self.messages}, ensure_ascii=False)
        storage.write(file, text + row + "\n")
        return f"{file}: row {text.count(chr(10)) + 1}"

    def _ids(self, messages: list[Message]) -> list[int]:
        try:
            return self._encoder.question(Conversation(list(messages)))
        except InputError as e:
            raise InputError(f"{self._loaded.path}: {e}") from None


def _generate(
    loaded: Loaded, ids: list[int], sampling: Sampling, stopped: Callable[[], bool]
) -> str:
    """Continues a prompt, prints the text while it is generated, and returns it."""
    max_new_tokens = _max_new_tokens(loaded, len(ids), sampling)
    config = generation_config(
        loaded.model, loaded.tokenizer, replace(sampling, max_new_tokens=max_new_tokens)
    )
    (completion,) = decode.generate(
        loaded.model, loaded.tokenizer, [ids], config, on_text=_print_piece, stopped=stopped
    )
    return completion.text


def _max_new_tokens(loaded: Loaded, prompt_tokens: int, sampling: Sampling) -> int:
    """Returns the maximum number of new tokens after a prompt, as far as the positions allow.

    Raises:
        InputError: The model has no position for a new token.
    """
    if loaded.positions is None:
        return sampling.max_new_tokens
    if loaded.family == "encoder-decoder":  # each side has its own positions
        max_prompt_tokens = loaded.positions
        available = loaded.positions - 1
    else:
        max_prompt_tokens = loaded.positions - 1
        available = loaded.positions - prompt_tokens
    if prompt_tokens > max_prompt_tokens:
        raise InputError(
            f"the prompt: expected at most {max_prompt_tokens:,} tokens (the model has "
            f"{loaded.positions:,} positions), found {prompt_tokens:,}: shorten it"
        )
    return min(sampling.max_new_tokens, available)


def fitted(
    render: Callable[[list[Message]], list[int]], messages: list[Message], most: int | None
) -> tuple[list[int], int]:
    """Renders a conversation, without its oldest turns if it is too long.

    A turn is a user's message with its answer. System messages always stay.

    Args:
        render: Returns the ids of messages.
        messages: The conversation.
        most: The maximum number of ids. None: no limit.

    Returns:
        The ids, and the number of turns that were left out.

    Raises:
        InputError: The last turn alone is too long.
    """
    kept, dropped = list(messages), 0
    while len(ids := render(kept)) > (most or len(ids)):
        turns = [i for i, m in enumerate(kept) if m["role"] == "user"]
        if len(turns) < 2:
            raise InputError(
                f"the message: expected at most {most:,} tokens with those of the chat template, "
                f"found {len(ids):,}: shorten it"
            )
        del kept[turns[0] : turns[1]]
        dropped += 1
    return ids, dropped


def _read_and_answer(conversation: ChatSession) -> None:
    """Answers messages and runs commands from standard input until /exit or its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (importing it gives input() line editing and a history)
    say(
        "/new starts a new conversation, /save FILE saves this one, /exit quits; "
        "Ctrl-C stops an answer"
    )
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        word, _, argument = line.partition(" ")
        try:
            if word == "/exit":
                return
            if word == "/new":
                conversation.restart()
            elif word == "/save" and argument.strip():
                say(conversation.save(argument.strip()))
            elif word.startswith("/"):
                say(f"{word}: expected /new, /save FILE or /exit")
            elif line:
                conversation.ask(line)
        except InputError as e:
            say(f"error: {e}")


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Within the block, the first Ctrl-C sets the event; the second one interrupts as usual."""
    stop, previous = threading.Event(), signal.getsignal(signal.SIGINT)

    def request_stop(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, request_stop)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


def _print_piece(piece: str) -> None:
    print_text(piece, end="")
