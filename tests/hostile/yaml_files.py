"""Recipes and cluster files that would take all time or memory, or are read as something else."""

from __future__ import annotations

from collections.abc import Iterator

RECIPE = """name: x
data: {sources: [{path: a}], sequence_length: 8}
tokenizer: {vocab_size: 300}
model: {config: {model_type: llama, extra: VALUE}}
train: {global_batch: 1, micro_batch: 1, steps: 1}
"""
CLUSTER = """available_node_types: {a: {}}
extra: VALUE
"""


def bomb(first: str, of: str) -> str:
    """Returns a list of values, each of which names the one before ten times."""
    lines = [f"a0: &a0 {first}"]
    for i in range(1, 9):
        lines.append(f"a{i}: &a{i} " + of.replace("ALIASES", ", ".join([f"*a{i - 1}"] * 10)))
    return "\n".join(lines) + "\n"


VALUES = {  # a value in a recipe and a cluster file -> what the error says; "=" if it is read
    "9" * 5000: f"'{'9' * 40}' where an integer of at most 64 bits is expected",
    "0x" + "f" * 5000: "an integer of at most 64 bits is expected",
    "!!int abc": "an integer of at most 64 bits is expected",
    "1e5000": "'1e5000' where a 64-bit number is expected",
    "[" * 10_000: "more than 64 levels of nesting",
    "&a [*a]": "the alias *a inside the value that it stands for",
    "{a: 1, a: 2}": "the key 'a' a second time (first in line ",
    "!!timestamp 2024-13-99": "tag:yaml.org,2002:timestamp",
    "{? [1] : 2}": "unhashable key",
    "2024-13-99": "='2024-13-99'",
    "1:30": "='1:30'",
    "[0.0, .inf]": "=[0.0, inf]",
    "[&a {b: 1}, {<<: *a, b: 2}, *a]": "=[{'b': 1}, {'b': 2}, {'b': 1}]",
}


def yaml_cases() -> Iterator[tuple[str, str, str]]:
    """Yields the kind of a file (recipe or cluster), its text, and what an error says (VALUES)."""
    for kind, template in (("recipe", RECIPE), ("cluster", CLUSTER)):
        for value, says in VALUES.items():
            yield kind, template.replace("VALUE", value), says
        yield kind, bomb("[x, x]", "[ALIASES]") + template, "more than 100,000 values"
        yield kind, bomb("{x: 1}", "{<<: [ALIASES]}") + template, "more than 100,000 values"
        nested = "".join(" " * i + "a:\n" for i in range(2000))
        yield kind, nested, "line 64: expected YAML, found more"
        yield kind, "#" * (17 << 20), "of at most 16 MiB, found more"
