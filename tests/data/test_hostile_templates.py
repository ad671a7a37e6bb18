"""Chat templates end within bounds of time and memory, and their faults are one line."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, refused
from helpers import tiny_models
from helpers.packages import package_files
from hostile.templates import BOMBS, FAULTS
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from sevenfold.data import template_limits
from sevenfold.data.chat_renderer import ChatRenderer
from sevenfold.data.sources.documents import UnusableExampleError
from sevenfold.data.sources.messages import Conversation
from sevenfold.errors import InputError

# of processor time: without limits each takes minutes or never ends, and machines differ in speed
SECONDS = 20.0
MEGABYTES = 500
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
RENDER = """
import json, resource, sys, time
from hostile.templates import BOMBS
from helpers import tiny_models
from sevenfold.data.chat_renderer import ChatRenderer
from sevenfold.data.sources.documents import UnusableExampleError
from sevenfold.data.sources.messages import Conversation
from sevenfold.errors import InputError

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

tokenizer = tiny_models.tokenizer("x")
talk = Conversation(json.loads(sys.argv[1]))
ChatRenderer(tokenizer).render(talk)
before = megabytes()
for name, template in BOMBS.items():
    tokenizer.chat_template = template
    began, message = time.thread_time(), ""
    try:
        ChatRenderer(tokenizer).render(talk)
    except (InputError, UnusableExampleError) as e:
        message = str(e)
    print(json.dumps([name, time.thread_time() - began, megabytes() - before, message]), flush=True)
"""


@pytest.mark.slow
def test_templates_end_within_bounds() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RENDER, json.dumps(TALK)],
        env={"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT / 'tests'}", "PATH": "", "HOME": "/nowhere"},
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30)),
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in results] == list(BOMBS)
    rendered = []
    for name, seconds, megabytes, message in results:
        assert seconds < SECONDS and megabytes < MEGABYTES, (name, seconds, megabytes)
        assert "\n" not in message and len(message) < 600, name
        assert not message or ": line " in message, message
        if not message:
            rendered.append(name)
    # the rendered text is short
    assert rendered == ["namespaces that hold each other", "long date"]


@pytest.mark.parametrize("name", ["nested loops", "repeated text", "format operator", "power"])
def test_some_of_them_at_once(name: str) -> None:
    with pytest.raises(InputError, match=r"line 1: .* it (takes|makes|formats) "):
        ChatRenderer(tiny_models.tokenizer(BOMBS[name])).render(Conversation(TALK))


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_file_and_the_line(name: str, tmp_path: Path) -> None:
    template, line = FAULTS[name]
    tokenizer = tiny_models.tokenizer(template)
    tokenizer.save_pretrained(tmp_path)
    tokenizer.name_or_path = str(tmp_path)
    with pytest.raises((InputError, UnusableExampleError)) as refusal:
        ChatRenderer(tokenizer).render(Conversation(TALK))
    message = str(refusal.value)
    assert f"{tmp_path}/chat_template.jinja: line {line}" in message, message
    assert "\n" not in message and "Traceback" not in message


def test_a_command_reports_them_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(tiny_models.save(tmp_path / "model", "llama", "x"))
    for template in (BOMBS["nested loops"], FAULTS["syntax"][0], FAULTS["include"][0]):
        (folder / "chat_template.jinja").write_text(template)
        error = refused(capsys, "chat", str(folder), "--prompt", "hi")
        assert f"{folder}/chat_template.jinja: line " in error


def test_limits_grow_with_the_conversation() -> None:
    """A template may build its text anew with each message, of which there may be many."""
    template = (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s ~ m.content %}"
        "{% for k in messages[:20] %}{% if k.role == m.role %}{% set x = k.role|upper %}{% endif %}"
        "{% endfor %}{% endfor %}{{ ns.s }}"
    )
    text = "x" * 1000
    roles = ("user", "assistant")
    talk = [{"role": roles[i % 2], "content": text} for i in range(1000)]
    renderer = ChatRenderer(tiny_models.tokenizer(template))
    assert renderer.render(Conversation(talk)) == text * 1000


CONVERSATIONS = [
    TALK,
    [{"role": "system", "content": "be kind"}, *TALK, *TALK],
    [{"role": "user", "content": " <b> & </think> 'x' \n"}, {"role": "assistant", "content": ""}],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "adds <numbers>",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def render_all(template: str) -> list[str]:
    """Renders conversations with transformers' function, in its present environment."""
    chat_template_utils._compile_jinja_template.cache_clear()
    texts = []
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for prompt in (False, True):
                try:
                    rendered = chat_template_utils.render_jinja_template(
                        [messages],
                        tools=tools,
                        chat_template=template,
                        add_generation_prompt=prompt,
                        **SPECIAL,
                    )
                    texts.append(rendered[0][0])
                except Exception as e:
                    texts.append(f"{type(e).__name__}: {e}")
    chat_template_utils._compile_jinja_template.cache_clear()
    return texts


def test_public_templates_give_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = r"axolotl/utils/chat_templates/templates/.+\.jinja"
    templates = package_files("axolotl", "0.19.0", pattern)
    for name, template in templates.items():
        texts = []
        for environment in (ImmutableSandboxedEnvironment, template_limits.BoundedEnvironment):
            monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", environment)
            texts.append(render_all(template.decode()))
        assert texts[0] == texts[1], name
    assert len(templates) > 20
