"""A finished model in use: text that goes on, and talk. In this process, without Ray."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sevenfold import storage
from sevenfold.data.examples import ConversationEncoder
from sevenfold.errors import InputError
from sevenfold.evaluate.stream import Sampling, produce, room
from sevenfold.model.load import Loaded, load
from sevenfold.report.console import say

Message = dict[str, str]


def generate(path: str, prompt: str, sampling: Sampling) -> str:
    """Prints what a model makes of a prompt, as it is made, and returns it. Ctrl-C ends it; what is there stays.

    A decoder goes on from [BOS] prompt; an encoder-decoder reads [BOS] prompt EOS, as in training.

    Raises InputError where there is no such model or the prompt has no room in it.
    """
    loaded = load(path)
    if loaded.family == "encoder":
        raise InputError(
            f"{loaded.path}: expected a decoder or an encoder-decoder, found an encoder ({loaded.model.config.model_type}), "
            "which writes no text: see sevenfold search and inspect"
        )
    ids = loaded.framed(prompt, tail=loaded.family == "encoder-decoder")
    if not ids:
        raise InputError("--prompt: expected text (the tokenizer has no BOS to begin with), found none")
    left = room(loaded, len(ids), sampling.max_new_tokens)
    if left < sampling.max_new_tokens:
        print(f"at most {left:,} tokens: the model's positions leave no more", file=sys.stderr, flush=True)
    torch.manual_seed(sampling.seed)
    with interruptible() as stop:
        made = produce(loaded, ids, sampling, _show, stop.is_set)
        print(flush=True)
    return made


def chat(path: str, system: str | None, prompts: Sequence[str] | None, sampling: Sampling) -> list[Message]:
    """A conversation in the terminal, by the tokenizer's chat template; with `prompts` these turns alone.

    Returns the messages. Raises InputError where the model is no decoder, its tokenizer has no chat template, the template
    refuses the conversation, or one of `prompts` is longer than the model's positions.
    """
    talk = Talk(load(path), system, sampling)
    if prompts:
        for prompt in prompts:
            say(f"> {prompt}")
            talk.ask(prompt)
    else:
        _converse(talk)
    return talk.messages


class Talk:
    """A conversation with a model.

    Attributes:
        messages: all of it, also what the model's positions no longer hold.
    """

    def __init__(self, loaded: Loaded, system: str | None, sampling: Sampling):
        if loaded.family != "decoder":
            raise InputError(
                f"{loaded.path}: expected a decoder to talk with, found an {loaded.family}: see sevenfold generate"
            )
        if not loaded.tokenizer.chat_template:
            raise InputError(
                f"{loaded.path}: expected a tokenizer with a chat template, found none: set tokenizer.chat_template=plain in "
                "the recipe of the fine-tuning, or use sevenfold generate"
            )
        self._loaded, self._system, self._sampling = loaded, system, sampling
        self._encoder = ConversationEncoder(loaded.tokenizer, 1)
        torch.manual_seed(sampling.seed)
        self.begin()

    def begin(self) -> None:
        """Anew, from the system's message."""
        self.messages: list[Message] = [{"role": "system", "content": self._system}] if self._system else []
        self._dropped = 0

    def ask(self, text: str) -> str:
        """Prints the answer as it is made, and keeps both; of a message that cannot be answered nothing is kept."""
        asked = [*self.messages, {"role": "user", "content": text}]
        space = self._loaded.positions
        new = min(self._sampling.max_new_tokens, space // 2) if space else 0
        ids, dropped = fitted(self._ids, asked, space - new if space else None)
        if dropped > self._dropped:
            say(f"(the model's {space:,} positions are full: it no longer sees the first {dropped} of your messages)")
        self._dropped = dropped
        self.messages = asked
        with interruptible() as stop:
            answer = produce(self._loaded, ids, self._sampling, _show, stop.is_set)
            print("\n", flush=True)
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def save(self, path: str) -> str:
        """Adds the conversation to a JSON lines file as a row that can be trained on; returns where."""
        to = storage.place(path)
        before = storage.read_text(to) if storage.exists(to) else ""
        if before and not before.endswith("\n"):
            before += "\n"
        storage.write(to, before + json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        return f"{to}: row {before.count(chr(10)) + 1}"

    def _ids(self, messages: list[Message]) -> list[int]:
        try:
            return self._encoder.question([(m["role"], m["content"]) for m in messages])
        except InputError as e:
            raise InputError(f"{self._loaded.path}: {e}") from None


def fitted(render: Callable[[list[Message]], list[int]], messages: list[Message], most: int | None) -> tuple[list[int], int]:
    """The ids of a conversation in at most `most` tokens, and how many of the oldest turns (a user's message with its answer)
    were left out for it; system messages stay. Raises InputError where the last turn alone is longer."""
    kept, dropped = list(messages), 0
    while len(ids := render(kept)) > (most or len(ids)):
        turns = [i for i, m in enumerate(kept) if m["role"] == "user"]
        if len(turns) < 2:
            raise InputError(f"the message: expected at most {most:,} tokens with its frame, found {len(ids):,}: shorten it")
        del kept[turns[0] : turns[1]]
        dropped += 1
    return ids, dropped


def _converse(talk: Talk) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then edits lines and knows those before
    say("/new begins anew, /save FILE keeps the conversation, /exit leaves; Ctrl-C stops an answer")
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            say("")
            return
        word, _, rest = line.partition(" ")
        try:
            if word == "/exit":
                return
            if word == "/new":
                talk.begin()
            elif word == "/save" and rest.strip():
                say(talk.save(rest.strip()))
            elif word.startswith("/"):
                say(f"{word}: expected /new, /save FILE or /exit")
            elif line:
                talk.ask(line)
        except InputError as e:
            say(f"error: {e}")


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Within the block a first Ctrl-C sets the event; a second one interrupts, as it does everywhere else."""
    stop, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def ask(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _show(piece: str) -> None:
    print(piece, end="", flush=True)
