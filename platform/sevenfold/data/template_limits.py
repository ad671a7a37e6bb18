"""Limits on what a chat template may take: steps, time, and the size of its texts and lists.

A template comes with a model, and so from anywhere. transformers renders it in Jinja's sandbox,
which keeps it from the interpreter but not from memory and time: `'x' * 10**10`, or loops within
loops. The environment below takes the place of that sandbox. It renders real templates to the same
text, in about a sixth more time.

Every loop, call, filter and operator whose result can be larger than its inputs is counted, or
checked before it is computed. What is not counted takes no longer than its part of the template is
long. What is takes time in proportion to values that exist already, whose size is limited; so the
time between two looks at the clock is short.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import LoopContext, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sevenfold.data.template_budget import (
    BUDGET,
    COSTLY,
    TemplateLimitError,
    check_filter,
    check_format,
    check_method,
    check_power,
    check_repeat,
    concat,
    copied,
    count,
    counted,
    made,
    modulo,
    plus,
    size,
)

MAX_SOURCE = 128 << 10  # characters; the longest real templates have some 30,000
_BUILT_IN = (str, bytes, int, float, list, tuple, dict)
# Their results are not larger than what they get, and they look at little of it.
_SMALL_FILTERS = ("length", "count", "default", "d", "first", "last", "abs", "float", "attr")
# They take much longer than their input is long; no chat template has them.
_LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
# Rendering needs the interpreter's lock anyway.
_LOCK = threading.RLock()


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a filter that checks what it gets and counts what it makes."""
    if name in _SMALL_FILTERS:
        return function
    first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if len(args) > first:
            value = args[first]
            if not (type(value) is str and len(args) + len(kwargs) == first + 1):
                BUDGET.tick(COSTLY)
                check_filter(name, value, [*args[first + 1 :], *kwargs.values()])
                if isinstance(value, Iterator):
                    args = (*args[:first], count(value), *args[first + 1 :])
        result = function(*args, **kwargs)
        if type(result) is str:
            BUDGET.tick(COSTLY)
            BUDGET.add(len(result))
            return result
        return count(result) if isinstance(result, Iterator) else made(result)

    return bounded


class _Code(CodeGenerator):
    """Compiles templates so that loops, joined texts and new lists are counted."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._weights: dict[int, int] = {}  # of the iterations over an expression, by its id

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        self._weights[id(node.iter)] = 1 + sum(1 for _ in node.find_all(nodes.Node))
        super().visit_For(node, frame)

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Compiles a node; what a loop iterates over is counted."""
        weight = self._weights.pop(id(node), None)
        if weight is None:
            return super().visit(node, *args, **kwargs)
        self.write("environment.counted(")
        super().visit(node, *args, **kwargs)
        self.write(f", {weight})")

    def _call(self, name: str, parts: list[nodes.Expr], frame: Frame) -> None:
        """Writes a call of a function of the environment."""
        self.write(f"environment.{name}(")
        for part in parts:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")

    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        # a sum with a text of the template itself grows no faster than that text is long
        if isinstance(node.left, nodes.Const) or isinstance(node.right, nodes.Const):
            super().visit_Add(node, frame)
        else:
            self._call("plus", [node.left, node.right], frame)

    def visit_Mod(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._call("modulo", [node.left, node.right], frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self._call("joined", node.nodes, frame)

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        # comparing with a text of the template itself, or searching in it, takes no time
        constant = nodes.Const | nodes.List | nodes.Tuple
        if len(node.ops) == 1 and isinstance(node.ops[0].expr, constant):
            super().visit_Compare(node, frame)
            return
        self.write(f"(environment.tick({COSTLY}) or ")
        super().visit_Compare(node, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.copied(")
        super().visit_Getitem(node, frame)
        self.write(")")

    def _write_made(self, visit: Callable[..., None], node: Any, frame: Frame) -> None:
        """Compiles a list, tuple or dictionary."""
        parts = [n for n in node.iter_child_nodes() if not isinstance(n, nodes.Const)]
        if not parts:
            visit(node, frame)
            return
        self.write("environment.made(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._write_made(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._write_made(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._write_made(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)


class BoundedTemplate(jinja2.Template):
    """A template, each rendering of which has its own budget."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Renders the template."""
        with _LOCK:
            BUDGET.start(kwargs)
            return super().render(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Renders the template piece by piece."""
        with _LOCK:
            BUDGET.start(kwargs)
            for part in super().generate(*args, **kwargs):
                BUDGET.add(len(part))
                yield part


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with limits, see the module."""

    code_generator_class = _Code
    template_class = BoundedTemplate
    intercepted_binops = frozenset(["*", "**", "%"])
    concat = staticmethod(concat)
    counted = staticmethod(counted)
    copied = staticmethod(copied)
    made = staticmethod(made)
    plus = staticmethod(plus)
    modulo = staticmethod(modulo)
    tick = BUDGET.tick

    def from_string(self, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Compiles a template.

        Raises:
            TemplateLimitError: It is too long.
        """
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"it has more than {MAX_SOURCE:,} characters")
        self.filters = {
            name: _bounded_filter(name, function)
            for name, function in self.filters.items()
            if name not in _LEFT_OUT
        }
        self.globals.pop("lipsum", None)
        self.loader = jinja2.DictLoader({})  # it says which template is not there
        if "namespace" in self.globals:
            self.globals["namespace"] = _opaque(self.globals["namespace"])
        with _LOCK:
            BUDGET.start({})
            return super().from_string(source, *args, **kwargs)

    @staticmethod
    def joined(*parts: Any) -> str:
        """Returns the texts of some values, joined (the operator ~)."""
        BUDGET.tick(COSTLY)
        BUDGET.add(sum(len(p) if isinstance(p, str) else size(p) for p in parts))
        return str_join(parts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Computes left * right, left ** right or left % right."""
        BUDGET.tick(COSTLY)
        if operator == "*":
            check_repeat(left, right)
        elif operator == "**":
            check_power(left, right)
        else:
            return modulo(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls a function, method or macro."""
        BUDGET.tick(COSTLY)
        if type(__obj) is BuiltinMethodType:
            owner = __obj.__self__
            if isinstance(owner, _BUILT_IN) or owner in _BUILT_IN:
                check_method(owner, __obj.__name__, (*args, *kwargs.values()))
        elif isinstance(__obj, LoopContext) and args:
            args = (counted(args[0], 20 * COSTLY), *args[1:])
        result = super().call(__context, __obj, *args, **kwargs)
        return made(result) if isinstance(result, _BUILT_IN) else result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns the sandbox's own format for the method of a string, with checks."""
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, [*args, *kwargs.values()])
            return function(*args, **kwargs)

        return bounded


def _opaque(namespace: Any) -> Any:
    """Returns a class of namespaces whose text does not contain what is in them."""
    return type("Namespace", (namespace,), {"__repr__": lambda self: "<Namespace>"})


def limit_transformers() -> None:
    """Makes transformers render all chat templates within limits."""
    from transformers.utils import chat_template_utils

    if chat_template_utils.ImmutableSandboxedEnvironment is not BoundedEnvironment:
        chat_template_utils.ImmutableSandboxedEnvironment = BoundedEnvironment
        chat_template_utils._compile_jinja_template.cache_clear()  # of templates without limits
