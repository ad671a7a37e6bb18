"""What a chat template may take: steps, time, and the size of the texts and lists that it makes.

See `sevenfold.data.template_limits`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

MAX_STEPS = 5_000_000  # evaluations of a part of an expression
MAX_SECONDS = 0.7  # of this thread's own time, so that a busy or sleeping machine does not count
MAX_VALUE = 4 << 20  # characters of one text, or items of a list with all that is in them
MAX_TOTAL = 32 << 20  # characters and items that are made while one conversation is rendered
MAX_BITS = 10_000  # of an integer
# Added for each character that a conversation has, since a template may copy what it builds with
# each message.
STEPS_PER_CHARACTER = 100
SECONDS_PER_CHARACTER = 2e-6
TOTAL_PER_CHARACTER = 1024
_STEPS_BETWEEN = 1000  # looks at the clock
COSTLY = 50  # steps for what takes time in proportion to the size of a value
MAX_WIDTH = 10_000  # of a formatted or indented value
_LONG_NUMBER = re.compile(r"\d{5,}")
_NESTED_FIELD = re.compile(r"\{[^{}]*\{")


class TemplateLimitError(Exception):
    """A template takes too much."""


class _Budget:
    """What the rendering of one conversation may still take.

    Attributes:
        steps: The steps that remain until the next look at the clock.
        total: The characters and items that may still be made.
        most: The largest value that may be made.
    """

    steps = 0
    total = MAX_TOTAL
    most = MAX_VALUE

    def start(self, given: dict[str, Any]) -> None:
        """Begins a rendering.

        Args:
            given: The values that the template is rendered with.
        """
        self._given: dict[str, Any] | None = given
        self._used = 0
        self._max_steps, self._max_seconds = MAX_STEPS, MAX_SECONDS
        self.steps = _STEPS_BETWEEN
        self.total, self.most = MAX_TOTAL, MAX_VALUE
        self._began = 0.0

    def look(self) -> None:
        """Compares what was used with the limits; to be called when `steps` are below zero."""
        now = time.thread_time()
        self._began = self._began or now
        self._used += _STEPS_BETWEEN - self.steps
        self.steps = _STEPS_BETWEEN
        if self._used > self._max_steps or now - self._began > self._max_seconds:
            self._extend()
        if self._used > self._max_steps or now - self._began > self._max_seconds:
            raise TemplateLimitError(
                f"it takes more than {self._max_steps:,} steps or {self._max_seconds:.1f} s"
            )

    def tick(self, count: int = 1) -> None:
        """Counts steps."""
        self.steps -= count
        if self.steps < 0:
            self.look()

    def add(self, size: int) -> None:
        """Counts characters or items before they are made."""
        self.total -= size
        if self.total < 0 or size > self.most:
            self._extend(size)
        if size > self.most:
            raise TemplateLimitError(f"it makes a text or list of more than {self.most:,}")
        if self.total < 0:
            raise TemplateLimitError(f"it makes texts and lists of more than {MAX_TOTAL:,} in all")

    def _extend(self, size: int = 0) -> None:
        """Adds once what is allowed for the length of the conversation."""
        if self._given is None:
            return
        length = _plain_size(self._given)
        self._given = None
        self._max_steps += STEPS_PER_CHARACTER * length
        self._max_seconds += SECONDS_PER_CHARACTER * length
        self.total += TOTAL_PER_CHARACTER * length
        self.most += 4 * length


BUDGET = _Budget()


def _plain_size(tree: Any) -> int:
    """Returns the number of characters and items in a tree of dicts and lists."""
    size, stack = 0, [tree]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            size += 2 * len(value)
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            size += len(value)
            stack += value
        elif isinstance(value, str):
            size += len(value)
    return size


def size(value: Any, indent: int = 0) -> int:
    """Returns the length of a value's text, about: that of all that is in it.

    Args:
        value: The value. What is in it twice counts twice.
        indent: Characters that are added before each item, for each level.

    Raises:
        TemplateLimitError: It is too large.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, dict | list | tuple):
        return 8
    size, stack = 0, [(value, 1)]
    while stack:
        item, level = stack.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, dict | list | tuple):
            size += len(item) * (1 + indent * level)
            stack += [(v, level + 1) for v in item]
            if isinstance(item, dict):
                stack += [(v, level + 1) for v in item.values()]
            BUDGET.tick(len(item))
        else:
            size += 8
        if size > BUDGET.most:
            BUDGET.add(size)
    return size


def counted(iterable: Any, weight: int = COSTLY) -> Any:
    """Counts the steps of a loop, and returns what it iterates over.

    Args:
        iterable: What the loop iterates over.
        weight: The steps of one iteration.
    """
    if isinstance(iterable, str | list | tuple | dict | range):
        BUDGET.tick(len(iterable) * weight)
        return iterable
    if hasattr(type(iterable), "__len__") or not hasattr(type(iterable), "__iter__"):
        # views of dictionaries; or what cannot be iterated over, of which the loop itself says so
        BUDGET.tick((len(iterable) if hasattr(type(iterable), "__len__") else 1) * weight)
        return iterable
    return count(iterable, weight)


def count(iterable: Iterable[Any], weight: int = COSTLY) -> Iterator[Any]:
    """Yields the items of an iterable, each of which counts as some steps."""
    for item in iterable:
        BUDGET.tick(weight)
        yield item


def made(value: Any) -> Any:
    """Counts a value that was made, and returns it."""
    if isinstance(value, str | bytes):
        BUDGET.add(len(value))
    elif isinstance(value, list | tuple | dict):
        BUDGET.add(size(value))
    return value


def copied(value: Any) -> Any:
    """Counts a part of a text or list, and returns it."""
    BUDGET.tick(COSTLY)
    if hasattr(value, "__len__"):
        BUDGET.add(len(value))
    return value


def concat(parts: Iterable[str]) -> str:
    """Joins the parts of an output."""
    texts = list(parts)
    BUDGET.add(sum(map(len, texts)))
    return "".join(texts)


def plus(left: Any, right: Any) -> Any:
    """Returns left + right."""
    if type(left) is str and type(right) is str:
        size = len(left) + len(right)
        if size > 1000:
            BUDGET.tick(COSTLY)
        BUDGET.add(size)
        return left + right
    if isinstance(left, list | tuple | bytes):
        BUDGET.tick(COSTLY)
        return made(left + right)
    return left + right


def modulo(left: Any, right: Any) -> Any:
    """Returns left % right."""
    if isinstance(left, str | bytes):
        check_format(str(left), right)
    return left % right


def check_format(text: str, values: Any) -> None:
    """Checks the widths and the length of `text % values` or `text.format(values)`."""
    if _LONG_NUMBER.search(text) or re.search(r"%[-+ #0]*[\d.]*\*", text):
        raise TemplateLimitError("it formats a value with a large or variable width")
    if _NESTED_FIELD.search(text):
        raise TemplateLimitError("it formats a value with a variable width")
    fields = text.count("%") + text.count("{")
    BUDGET.add(len(text) + fields * (8 + size(values)))
    widths = sum(int(n) for n in re.findall(r"\d+", text))
    BUDGET.add(widths)


def check_repeat(left: Any, right: Any) -> None:
    """Checks the size of left * right."""
    for value, times in ((left, right), (right, left)):
        if hasattr(value, "__len__") and isinstance(times, int):
            BUDGET.add(max(size(value), len(value)) * max(0, times))
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def check_power(left: Any, right: Any) -> None:
    """Checks the size of left ** right."""
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(max(1, left.bit_length()) * abs(right))


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TemplateLimitError(f"it makes an integer of more than {MAX_BITS:,} bits")


def check_method(value: Any, name: str, arguments: tuple[Any, ...]) -> None:
    """Checks the size of the result of a method of a built-in type."""
    if name in ("center", "ljust", "rjust", "zfill"):
        BUDGET.add(max([0, *(n for n in arguments if isinstance(n, int))]))
    elif name == "replace" and len(arguments) >= 2:
        old, new = arguments[:2]
        if isinstance(old, type(value)) and isinstance(new, type(value)):
            times = value.count(old)
            BUDGET.add(len(value) + times * len(new))
    elif name == "join" and arguments:
        items = arguments[0]
        length = len(items) if hasattr(items, "__len__") else 0
        BUDGET.add(size(items) + length * len(value))
    elif name in ("expandtabs", "translate", "maketrans", "to_bytes", "from_bytes", "fromhex"):
        raise TemplateLimitError(f"it calls {name}, which is not supported in chat templates")
    elif isinstance(value, str | bytes | list | tuple):
        # a copy, or a search, of the whole
        BUDGET.add(len(value) >> 4)


def check_filter(name: str, value: Any, arguments: list[Any]) -> None:
    """Checks the size of the result of a filter."""
    numbers = [n for n in arguments if isinstance(n, int)]
    if any(abs(n) > MAX_WIDTH for n in numbers) and name not in ("truncate", "default", "d"):
        raise TemplateLimitError(f"the filter {name} gets a number above {MAX_WIDTH:,}")
    if name == "replace" and isinstance(value, str) and len(arguments) >= 2:
        check_method(value, name, (str(arguments[0]), str(arguments[1])))
    elif name == "join":
        items = len(value) if hasattr(value, "__len__") else 0
        BUDGET.add(size(value) + items * size(arguments[0] if arguments else ""))
    elif name == "format":
        check_format(str(value), arguments)
    elif name == "indent" and isinstance(value, str):
        width = arguments[0] if arguments else 4
        width = len(width) if isinstance(width, str) else max([0, *numbers])
        BUDGET.add(len(value) + value.count("\n") * width)
    elif name == "tojson":
        texts = [len(a) for a in arguments if isinstance(a, str)]
        if indent := max([0, *numbers, *texts]):
            BUDGET.add(size(value, indent))
    elif name == "sum" and any(not isinstance(a, int | float | str) for a in arguments):
        raise TemplateLimitError("the filter sum adds something else than numbers")
    elif isinstance(value, str | list | tuple | dict):
        BUDGET.add(size(value) >> 4)
