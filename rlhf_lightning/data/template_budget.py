"""Limits the work of a chat template, which may come from an untrusted source and never end."""

import re
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import wraps
from typing import Any, TypeAlias

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context
from jinja2.visitor import NodeTransformer

Value: TypeAlias = Any
"""A value in a template, which Jinja does not type."""
STEPS = 3_000_000
"""Largest number of loop iterations and calls in one rendering."""
LENGTH = 5_000_000
"""Largest number of characters of a text, or items of a list, that a template may create."""
CHARACTERS = 100
"""Number of characters that count as one step."""
_LOOP, _TEXT, _SHOWN = "rlhf_loop", "rlhf_text", "rlhf_shown"
_SLOW = {"wordwrap", "urlize", "pprint"}
_QUICK = {"length", "count", "first", "last", "default", "d"}
_WIDE_METHODS = {"ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map"}
_WIDE_FILTERS = {"center", "indent", "slice", "batch", "tojson", "format"}
_DIGITS = re.compile(r"\d{7,20}")
_LIMITED = ("*", "+", "**", "%")


class OverBudgetError(TemplateRuntimeError):
    """A template exceeded the budget of one rendering."""


class Budget:
    """Counts the work of a template.

    Args:
        template: The template as transformers compiles it; it is recompiled with counting.
        source: Text of the template.

    Example:
        ```python
        name, budget = _filled(source)  # as `data.templates` does
        budget.begin()
        tokenizer.apply_chat_template(messages, chat_template=name, tokenize=False)
        print(budget.steps)
        ```
    """

    def __init__(self, template: Any, source: str) -> None:
        self.steps = 0
        environment = template.environment
        self._call, self._operate = environment.call, environment.call_binop
        environment.call, environment.call_binop = self.call, self.operate
        environment.intercepted_binops = frozenset(_LIMITED)
        given = {name: self._filter(name, one) for name, one in environment.filters.items() if name not in _SLOW}
        counted_items = pass_context(lambda _, items, cost: self.counted(items, cost))
        environment.filters = given | {_LOOP: counted_items, _TEXT: self.concatenate, _SHOWN: self.shown}
        tree = _Counted().visit(environment.parse(source))
        counted = Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
        template.root_render_func, template.blocks = counted.root_render_func, counted.blocks

    def begin(self) -> None:
        """Reset the count at the start of a rendering."""
        self.steps = 0

    def spend(self, steps: int = 1) -> None:
        """Count steps.

        Raises:
            OverBudgetError: If there are too many steps.
        """
        self.steps += steps
        if self.steps > STEPS:
            raise OverBudgetError(f"the chat template runs for more than {STEPS:,} steps; it may never end")

    def counted(self, items: Iterable[Value], cost: int) -> Iterator[Value]:
        """Count the items of a loop."""
        for item in items:
            self.steps += cost
            if self.steps > STEPS:
                self.spend()
            yield item

    def shown(self, value: Value) -> Value:
        """Count a printed value."""
        if isinstance(value, str) and len(value) > CHARACTERS:
            self.spend(len(value) // CHARACTERS)
        return value

    def call(self, context: Context, function: Value, *args: Value, **kwargs: Value) -> Value:
        """Count a call, and make it in the sandbox."""
        self.spend(10)
        if (name := getattr(function, "__name__", "")) in _WIDE_METHODS:
            _check_widths((*args, *kwargs.values()))
            if "format" in name:
                _check_widths(_DIGITS.findall(getattr(getattr(function, "__wrapped__", None), "__self__", "")))
        return self.sized(self._call(context, function, *args, **kwargs))

    def operate(self, context: Context, operator: str, left: Value, right: Value) -> Value:
        """Apply an operator, the result of which may be much larger than its operands.

        Args:
            context: Jinja's context.
            operator: The operator, for example `*`.
            left: Left operand.
            right: Right operand.

        Raises:
            OverBudgetError: If the result would be too large.
        """
        numbers = [abs(value) for value in (left, right) if isinstance(value, int)]
        if operator == "**" and numbers and max(numbers) > 1000:
            raise OverBudgetError("the chat template computes powers of numbers above 1000, which is not allowed")
        if operator == "*" and len(numbers) == 1:
            sequence = right if isinstance(left, int) else left
            _check_length(len(sequence) * numbers[0] if isinstance(sequence, Sized) else 0)
        if operator == "%" and isinstance(left, str):
            _check_widths(_DIGITS.findall(left))
        return self.sized(self._operate(context, operator, left, right))

    def concatenate(self, parts: Iterable[Value]) -> str:
        """Count and concatenate texts, `a ~ b`."""
        self.spend()
        texts = [str(part) for part in parts]
        _check_length(sum(map(len, texts)))
        return "".join(texts)

    def sized(self, value: Value) -> Value:
        """Return a created value after checking its size."""
        if isinstance(value, str | list | tuple | dict):
            _check_length(len(value))
        elif isinstance(value, range):
            self.spend(len(value))
        return value

    def _filter(self, name: str, function: Callable[..., Value]) -> Callable[..., Value]:
        """Make a Jinja filter that is counted."""

        @wraps(function)  # keeps the attributes by which Jinja passes the context
        def limited(*args: Value, **kwargs: Value) -> Value:
            for value in args:
                if isinstance(value, str):
                    if len(value) > CHARACTERS:
                        self.spend(len(value) // CHARACTERS)
                elif isinstance(value, list | tuple | range):
                    self.spend(1 if name in _QUICK else 1 + len(value))
            if name in _WIDE_FILTERS:
                _check_widths((*args[1:], *kwargs.values()))
            if name == "format":
                _check_widths(_DIGITS.findall(str(args[0])))
            return self.sized(function(*args, **kwargs))

        return limited


def _check_length(length: int) -> None:
    if length > LENGTH:
        raise OverBudgetError(f"the chat template creates a text or list longer than {LENGTH:,}")


def _check_widths(values: Iterable[Value]) -> None:
    """Check numbers that determine the size of a result: integers, and digits in a format."""
    for value in values:
        if isinstance(value, int | str) and str(value).lstrip("-").isdigit():
            _check_length(abs(int(value)))


class _Counted(NodeTransformer):
    """Rewrites a template so that loops, printed values and concatenations pass through counting filters."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - Jinja calls it so
        """`{% for … in items %}`."""
        self.generic_visit(node)
        text = sum(len(one.data) for one in node.find_all(nodes.TemplateData))
        node.iter = _filter(node.iter, _LOOP, nodes.Const(1 + text // CHARACTERS))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802 - Jinja calls it so
        """`{{ value }}` and the text around it."""
        self.generic_visit(node)
        node.nodes = [
            one if isinstance(one, nodes.TemplateData | nodes.Const) else _filter(one, _SHOWN) for one in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802 - Jinja calls it so
        """`a ~ b`."""
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes).set_lineno(node.lineno), _TEXT)


def _filter(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    """A Jinja node that applies a filter."""
    made = nodes.Filter(node, name, list(args), [], None, None)
    made.set_lineno(node.lineno)
    return made
