"""All mistakes of a recipe are told at once, each with its place and what to write instead."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sevenfold.cli import main
from sevenfold.errors import InputError
from sevenfold.recipe import Recipe, loads, parse
from sevenfold.recipe.explain import example, listed_keys
from sevenfold.recipe.keys import all_keys
from sevenfold.recipe.mistakes import MAX_MESSAGES, PLACEHOLDERS
from sevenfold.recipe.section import UNCHECKED

VALID = """\
name: x
data:
  sources:
    - path: a
      name: web
      weight: 1.0
      filters: [{column: score, min: 3}]
  curriculum: [{at_tokens: 100, weights: {web: 1}}]
  validation: [{path: b}]
  sequence_length: 64
tokenizer:
  vocab_size: 512
model:
  config: {model_type: llama, hidden_size: 32}
train:
  global_batch: 8
  micro_batch: 4
  steps: 10
optimizer:
  learning_rate: 1.0e-3
sweep:
  trials: 4
  space:
    optimizer.learning_rate: {loguniform: [1.0e-4, 1.0e-2]}
"""


def messages(path: Path, text: str, *overrides: str) -> list[str]:
    """Returns the messages about a recipe, without its folder."""
    path = path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as e:
        parse(str(path), overrides)
    assert str(e.value) == "\n".join(e.value.messages)
    for message in e.value.messages:
        assert "\n" not in message and len(message) <= 700
    return [message.removeprefix(f"{path.parent}/") for message in e.value.messages]


def test_the_recipe_of_these_tests_is_valid() -> None:
    assert loads(VALID, "r.yaml").steps == 10


# change of VALID: (old text, new text) -> what its only message begins with. "LINE" is the line.
MISTAKES = {
    ("vocab_size: 512", "vocab_size: many"): "tokenizer.vocab_size: input should be a valid integ",
    ("vocab_size: 512", "vocab_size: 1"): "tokenizer.vocab_size: input should be greater than or",
    ("learning_rate: 1.0e-3", "lr: 1.0e-3"): "unknown key 'optimizer.lr': write "
    "optimizer.learning_rate=0.001",
    ("learning_rate: 1.0e-3", "learnin_rate: 1"): "unknown key 'optimizer.learnin_rate'; did you "
    "mean 'optimizer.learning_rate'?",
    ("learning_rate: 1.0e-3", "warmup_steps: 3"): "unknown key 'optimizer.warmup_steps'; did you "
    "mean 'schedule.warmup_steps'?",
    ("optimizer:", "optimiser:"): "unknown key 'optimiser'; did you mean 'optimizer'?",
    ("      name: web", "      nam: web"): "unknown key 'data.sources.0.nam'; did you mean "
    "'data.sources.0.name'?",
    ("steps: 10", "steps: 10\nlearning_rate: 1"): "unknown key 'learning_rate'; did you mean "
    "'optimizer.learning_rate'?",
    ("steps: 10", "steps: 10\nevery: 1"): "unknown key 'every'; did you mean 'validation.every' or "
    "'checkpoint.every'?",
    ("steps: 10", "steps: 10\nschedule.name: wsd"): "unknown key 'schedule.name': write name in "
    "the section schedule",
    ("steps: 10", "steps: 10\nxyzzy: 1"): "unknown key 'xyzzy': `sevenfold explain` lists all keys",
    ("steps: 10", "steps: 10\nsearch: {}"): "unknown key 'search': it was renamed to 'sweep'",
    ("steps: 10", "steps: 10\nschedule: cosine"): "schedule: input should be keys and values, "
    "found 'cosine': write schedule.name=cosine",
    ("steps: 10", "steps: 10\nguard: 5"): "guard: input should be keys and values, found 5: guard "
    "is a section, with keys such as spike_factor, max_skipped, max_rollbacks",
    ("  learning_rate", "  name: adam\n  learning_rate"): "optimizer.name: input should be 'adamw' "
    "or 'muon', found 'adam'; did you mean 'adamw'?",
    (
        "  micro_batch: 4",
        "  micro_batch: 4\n  dtype: fp32",
    ): "train.dtype: input should be 'float32'"
    " or 'bfloat16', found 'fp32': write train.dtype=float32",
    ("  micro_batch: 4\n", ""): "required key 'train.micro_batch' is missing",
    ("    - path: a\n      name", "    - name"): "this recipe does not say where its data is: give "
    "data.path=FILE_OR_FOLDER",
    ("min: 3", "mini: 3"): "unknown key 'data.sources.0.filters.0.mini'; did you mean "
    "'data.sources.0.filters.0.min'?",
    (", min: 3", ""): "data.sources.0.filters.0: give at least one of min, max, one_of",
    ("web: 1}", "wob: 1}"): "data: curriculum: no source has the name 'wob'; did you mean 'web'?",
    ("web: 1}", "web: -1}"): "data: curriculum: the weight of 'web' must be 0 or more, found -1",
    ("  steps: 10", "  steps: 10\n  tokens: 9"): "train: give either steps or tokens",
    ("hidden_size: 32}", "hidden_size: 32}\n  path: p"): "model: give either config (a new model) "
    "or path",
    ("[1.0e-4, 1.0e-2]", "[1, 1.0e-2]"): "sweep.space.optimizer.learning_rate: the space is empty",
    ("[1.0e-4, 1.0e-2]", "[1]"): "sweep.space.optimizer.learning_rate.loguniform: "
    "input should have more entries, found [1]",
    ("trials: 4", "trials: 4\n  max_cost: 3"): "sweep: give both max_cost and worker_hour_cost",
    ("trials: 4", "trials: 4\n  scheduler: bohb"): "sweep: scheduler bohb is hyperband with algo",
    ("tokenizer:", "adapter: {rank: 4}\ntokenizer:"): "adapter needs model.path",
    ("path: b}]", "path: b}]\n  lanes: 3"): "train.global_batch (8) must be a multiple of",
    ("path: b}]", "path: b}]\n  packing: true"): "data.packing: input should be 'best_fit' or "
    "'concatenate', found True: write data.packing=best_fit",
    ("path: b}]", "path: b}]\n  skip: [[5, 4]]"): "data: skip: expected ranges [first, last]",
}


@pytest.mark.parametrize(("change", "says"), MISTAKES.items())
def test_a_mistake_is_told_with_its_line(
    change: tuple[str, str], says: str, tmp_path: Path
) -> None:
    old, new = change
    assert VALID.count(old) == 1
    text = VALID.replace(old, new)
    [message] = messages(tmp_path, text)
    place, _, told = message.partition(": ")
    assert told.startswith(says), message
    line = re.fullmatch(r"r\.yaml:(\d+)", place)
    assert line, message
    changed = next(
        i
        for i, (a, b) in enumerate(zip(VALID.split("\n"), text.split("\n"), strict=False))
        if a != b
    )
    # the line that was changed, a line that was added after it, or the section that lacks a key
    assert int(line[1]) - (changed + 1) in (-3, -2, -1, 0, 1), message


def test_mistakes_in_several_sections_are_told_together(tmp_path: Path) -> None:
    """Of any two mistakes in different sections, both messages are those of each alone."""
    random.seed(0)
    pairs = list(itertools.combinations(MISTAKES, 2))
    compared = 0
    for pair in random.sample(pairs, 120):
        text, alone = VALID, []
        for old, new in pair:
            if text.count(old) != 1:
                break
            text = text.replace(old, new)
            alone += [m.partition(": ")[2] for m in messages(tmp_path, VALID.replace(old, new))]
        else:
            told = [m.partition(": ")[2] for m in messages(tmp_path, text)]
            subjects = [set(re.findall(r"[a-z_]+\.[a-z_.0-9]+|^[a-z_]+", m)) for m in alone]
            if subjects[0] & subjects[-1]:
                continue  # about one key: the second may only follow from the first
            compared += 1
            first = {m for m in alone if any(word in m for word in ("unknown key", "input should"))}
            assert first <= set(told), (pair, told)
            assert set(told) <= set(alone), (pair, told)
    assert compared > 60


def test_what_only_follows_from_a_wrong_value_is_not_told(tmp_path: Path) -> None:
    text = VALID.replace("steps: 10", "steps: many").replace("global_batch: 8", "global_batch: x")
    text = text.replace("sequence_length: 64", "sequence_length: 1").replace("vocab_size", "vocab")
    told = messages(tmp_path, text)
    assert [m.split(": ")[0] for m in told] == ["r.yaml:10", "r.yaml:12", "r.yaml:16", "r.yaml:18"]
    # contradictions of other sections are told all the same
    told = messages(tmp_path, text, "validation.patience=3", "data.held_out=0.1")
    assert any("keep_best and patience need" in m for m in told)
    assert any("give either validation (separate sources) or held_out" in m for m in told)


def test_an_override_is_its_own_place(tmp_path: Path) -> None:
    told = messages(
        tmp_path,
        VALID.replace("vocab_size: 512", "vocab_size: 1"),
        "train.stepz=3",
        "data.lanes=3",
        "train.steps=[1",
        "parallel.tensor=2",
        "optimizer={lr: 3}",
        "name",
        "data.sources.3.path=x",
    )
    assert len(told) == 8
    assert told[0].startswith("r.yaml:12: tokenizer.vocab_size")
    by_place = "\n".join(told)
    for says in (
        "'train.stepz=3': unknown key 'train.stepz'; did you mean 'train.steps'?",
        "'parallel.tensor=2': parallel.tensor (2) must divide",
        "'optimizer={lr: 3}': unknown key 'optimizer.lr': write optimizer.learning_rate=3",
        "'name': expected key.path=value, for example name=VALUE",
        "'data.sources.3.path=x': unknown key 'data.sources.3.path': data.sources has entries 0 to",
    ):
        assert says in by_place, told


def test_at_most_twenty_mistakes_are_told(tmp_path: Path) -> None:
    text = VALID + "".join(f"xyzzy{i}: 1\n" for i in range(50))
    told = messages(tmp_path, text)
    assert len(told) == MAX_MESSAGES + 1 and told[-1] == "and 30 more"
    assert all("unknown key" in m for m in told[:-1])


def test_hostile_keys_and_values_stay_one_line(tmp_path: Path) -> None:
    hostile = ["a\nb", "\x1b[31m", "\u202e", "x" * 2**14, "https://user:secret@host/a?sig=secret"]
    for text in hostile:
        for tree in (
            {text: 1},
            {"optimizer": {text: 1}},
            {"optimizer": {"name": text}},
            {"optimizer": text},
            {"train": {"steps": text}},
            {"lr": text},
            {"output_dir": text},
            {"datasets": [text]},
            {"model": text},
        ):
            recipe = json.loads(json.dumps(yaml.safe_load(VALID) | tree))
            told = messages(tmp_path, yaml.safe_dump(recipe))
            assert "secret" not in "".join(told), told
            assert len(told) < 10
    long = "x" * 2**20
    assert len(messages(tmp_path, f"{VALID}? {long}\n: {long}\n")) == 1
    for argument in (f"lr={'x' * 2**20}", f"{'x' * 2**20}=1", "x" * 2**20, "a\nb", "lr=a\x1b"):
        messages(tmp_path, VALID, argument)


def test_the_command_prints_each_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(VALID.replace("vocab_size: 512", "vocab_size: 1"))
    before = sorted(tmp_path.rglob("*"))
    assert main(["pretrain", str(tmp_path / "r.yaml"), "train.stepz=1", "a\x1b=1"]) == 2
    output = capsys.readouterr()
    assert not output.out and "\x1b" not in output.err
    assert [line.split(": ")[0] for line in output.err.splitlines()] == ["error"] * 3
    assert sorted(tmp_path.rglob("*")) == before


def test_a_stored_recipe_is_told_in_the_same_way() -> None:
    text = VALID.replace("vocab_size: 512", "vocab_size: 1").replace("steps: 10", "stepz: 10")
    with pytest.raises(InputError) as e:
        loads(text, "runs/x/recipe.yaml")
    assert [m.split(": ")[0] for m in e.value.messages] == [
        "runs/x/recipe.yaml:12",
        "runs/x/recipe.yaml:18",
    ]
    assert loads(VALID.replace("sweep:", "search:"), "old").sweep is not None


def test_lines_are_those_of_merged_and_repeated_values(tmp_path: Path) -> None:
    text = VALID.replace("steps: 10", "steps: 10\nvalidation: &v\n  every: x\ncheckpoint: *v")
    told = messages(tmp_path, text)
    assert [m.split(": ")[:2] for m in told] == [
        ["r.yaml:20", "validation.every"],
        ["r.yaml:20", "checkpoint.every"],
    ]
    told = messages(tmp_path, text.replace("checkpoint: *v", "checkpoint:\n  <<: *v\n  keep: y"))
    assert [m.split(": ")[0] for m in told] == ["r.yaml:20", "r.yaml:20", "r.yaml:23"]


def test_each_required_key_has_a_placeholder() -> None:
    required = {f"{k.owner.__name__}.{k.name}" for k in all_keys() if k.field.is_required()}
    assert required == set(PLACEHOLDERS)


def test_any_wrong_value_anywhere_is_refused_in_one_line_each() -> None:
    """No value of any type in any place leads to another error, and its key is named."""
    random.seed(1)
    values: list[Any] = [None, True, -1, 10**18, 0.5, float("nan"), "", "x", [], [1, "a"], {}, [{}]]
    values += [{"x": 1}, [[]], [{"path": 3}]]
    tree = yaml.safe_load(VALID) | {"adapter": {}, "model": {"path": "m"}, "tokenizer": {}}
    recipe = Recipe.model_validate(tree)
    for key in listed_keys():
        for value in random.sample(values, 6):
            override = key.path.replace("KEY", "seed"), value
            try:
                recipe.override(dict([override]))
            except InputError as e:
                assert 0 < len(e.messages) < 8, (override, e.messages)
                assert all("\n" not in message for message in e.messages)


def test_the_example_of_each_key_is_valid() -> None:
    for key in all_keys():
        if key.section is not None and key.path not in ("data.sources", "sweep.space"):
            continue
        tree = yaml.safe_load(VALID)
        tree["data"]["test"] = [{"path": "t", "filters": [{"column": "c"}]}]
        tree["data"]["validation"][0]["filters"] = [{"column": "c"}]
        name, _, value = example(key).partition("=")
        node: Any = tree
        *parents, last = name.replace("sweep.space.optimizer.", "sweep.space.optimizer/").split(".")
        for part in parents:
            part = part.replace("/", ".")
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = yaml.safe_load(value) if value else ""
        if isinstance(node[last], str) and re.fullmatch(r"[\d.]+e-?\d+", node[last]):
            node[last] = float(node[last])
        Recipe.model_validate(tree, context={UNCHECKED: None})
