"""The sandbox of chat templates: Jinja's immutable sandbox, with limits of time and memory.

A template comes with a model's files, and one with `{{ "x" * 10**10 }}` must be refused by name. No value is
computed when a template is compiled. When it is rendered, every operation whose result can be larger than its
inputs (operators, filters, methods, joins) is checked before it runs. The size of its result is charged to
the rendering's budget. The time is checked there as well, and at each turn of a loop.

The time of a single comparison of nested lists, a single sort or a single sum cannot be limited here. For
these the rendering process is killed, see `__main__.py`.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from string import Formatter
from typing import Any

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from dynamo_redis.errors import TemplateError

_INT_BITS = 1 << 16
_CHAR_BYTES = 4  # the widest stored character
_ITEM_BYTES = 64  # an item of a list that a text is split into
_NUMBER_CHARS = 330  # the longest text of a float
_JSON_INDENT = 64
_ROUND_DIGITS = 300
_DATE_FORM_CHARS = 256
_DICT_ATTRIBUTES = frozenset(dir(dict))
_DIGITS = re.compile(r"\d+")
_PRINTF_STAR = re.compile(r"%[^%*a-zA-Z]*\*")
"""A field with a width or precision that is given as a value. No such field can have a key."""

_WRITES_TEXT = {
    *("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "lower", "pprint", "replace"),
    *("safe", "string", "striptags", "title", "trim", "truncate", "upper", "urlencode", "urlize"),
    *("wordcount", "wordwrap", "xmlattr"),
}
"""Filters that turn any value into text."""


class Runaway(TemplateError):
    """A rendering exceeded its limit of time, memory or output."""


class _Budget(threading.local):
    """The time and memory left for the rendering that runs in this thread."""

    ends_at: float = math.inf
    left_bytes: int = 0


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks text for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the base class's declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse the block into its content, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_transparent")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _transparent(self, caller: Callable[[], str]) -> str:
        return caller()


class _CodeGenerator(jinja2.compiler.CodeGenerator):
    """Compiles operations into calls of the environment that Jinja would compile to plain Python or
    compute."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame) -> None:  # noqa: N802 - Jinja's name
        """Compile `a ~ b`."""
        self.write("environment.concat_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: jinja2.nodes.Getitem, frame: jinja2.compiler.Frame) -> None:  # noqa: N802 - Jinja's name
        """Compile `a[1:]`, which copies."""
        is_slice = isinstance(node.arg, jinja2.nodes.Slice)
        self.write("environment.charged(" if is_slice else "")
        super().visit_Getitem(node, frame)
        self.write(")" if is_slice else "")

    def visit_Compare(self, node: jinja2.nodes.Compare, frame: jinja2.compiler.Frame) -> None:  # noqa: N802 - Jinja's name
        """Compile comparisons behind a check of the time, but for those with a constant, which are quick."""
        sides = (node.expr, *(operand.expr for operand in node.ops))
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        is_checked = searches or not any(isinstance(side, jinja2.nodes.Const) for side in sides)
        self.write("(environment.check_time() or " if is_checked else "(")
        super().visit_Compare(node, frame)
        self.write(")")

    def _output_child_to_const(
        self, node: jinja2.nodes.Expr, frame: jinja2.compiler.Frame, finalize: Any
    ) -> str:
        if not isinstance(node, jinja2.nodes.TemplateData):
            raise jinja2.nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class TemplateEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with the options, filters and globals of transformers, and the limits."""

    code_generator_class = _CodeGenerator
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, jinja2.ext.loopcontrols],
            optimized=False,
            finalize=self.bounded,
        )
        self._budget = _Budget()
        self.filters["tojson"] = self.do_tojson
        self.filters["join"] = self.do_join
        self.filters = {name: self._limited(name, function) for name, function in self.filters.items()}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            check = jinja2.nodes.EnvironmentAttribute("check_time")
            call = jinja2.nodes.Call(check, [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(call).set_lineno(loop.lineno, override=True))
            if loop.test is not None:  # items that it leaves out do not reach the body
                has_time = jinja2.nodes.Not(call).set_lineno(loop.lineno, override=True)
                loop.test = jinja2.nodes.And(has_time, loop.test).set_lineno(loop.lineno)
        return tree

    # ----------------------------------------------------------------- the budget

    @contextmanager
    def limits(self, *, time_s: float, memory_bytes: int) -> Iterator[None]:
        """Limit the rendering of this thread inside the `with` block. Blocks cannot be nested."""
        self._budget.ends_at = time.monotonic() + time_s
        self._budget.left_bytes = memory_bytes
        try:
            yield
        finally:
            self._budget.ends_at = math.inf
            self._budget.left_bytes = 0

    def check_time(self) -> None:
        """Raise Runaway if the time of this thread's rendering is up."""
        if time.monotonic() > self._budget.ends_at:
            raise Runaway("the chat template ran for too long")

    def expect(self, size_bytes: int) -> None:
        """Raise Runaway if a result of this size exceeds the rendering's budget."""
        if size_bytes > self._budget.left_bytes:
            raise Runaway("the chat template makes more text than it may")

    def charged(self, value: Any) -> Any:
        """Charge a value's size, if it has one, to the budget; return the value."""
        if isinstance(value, (str, bytes, list, tuple, dict, set)):
            budget, size_bytes = self._budget, sys.getsizeof(value)
            if size_bytes > budget.left_bytes:
                self.expect(size_bytes)
            budget.left_bytes -= size_bytes
            self.check_time()
        return value

    def text_chars(self, value: Any) -> int:
        """Return an upper bound of the characters in a value's text. Raises Runaway if that is over the
        budget.

        The text of a list that contains another list twice can be exponentially longer than the list.
        """
        chars = 0
        pending = [iter((value,))]
        while pending:
            for item in pending[-1]:
                chars += 4
                if isinstance(item, (str, bytes)):
                    chars += len(item)
                elif isinstance(item, (int, float)):
                    chars += _NUMBER_CHARS if isinstance(item, float) else item.bit_length()
                elif (inner := _items_of(item)) is not None:
                    pending.append(iter(inner))
                    self.check_time()
                    break
                else:
                    chars += 256
                self.expect(chars)
            else:
                pending.pop()
        return chars

    def bounded(self, value: Any) -> Any:
        """Return a value if its text fits the budget. Raises Runaway."""
        if not isinstance(value, str):
            self.text_chars(value)
        return value

    # ----------------------------------------------------------------- access

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return `obj.attribute` as Jinja's sandbox does; items of objects that came as JSON at once."""
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    # ----------------------------------------------------------------- operations with larger results

    def concat(self, pieces: Iterable[str]) -> str:
        """Join the pieces of a macro's or a block's output."""
        pieces = list(pieces)
        self.expect(sum(map(len, pieces)))
        text: str = self.charged("".join(pieces))
        return text

    def concat_values(self, values: Iterable[Any]) -> str:
        """Join the texts of values: `a ~ b ~ …`."""
        return self.concat([str(self.bounded(value)) for value in values])

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right` if the result is not too large."""
        if operator == "+" and type(left) is type(right) is str:
            self.expect(len(left) + len(right))
            return self.charged(left + right)
        sizes = [side.bit_length() for side in (left, right) if isinstance(side, int)]
        if sizes and max(sizes) > _INT_BITS:
            raise Runaway("the chat template computes with too large a number")
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, (str, bytes, list, tuple)) and isinstance(count, int):
                    self.expect(sys.getsizeof(text) * max(count, 0))
        elif operator == "**" and len(sizes) == 2 and sizes[0] * abs(right) > _INT_BITS:
            raise Runaway("the chat template computes too large a number")
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._expect_printf(str(left), right)
        elif operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, Sequence):
            self.expect(len(left) + len(right))
        return self.charged(super().call_binop(context, operator, left, right))

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call an object for a template, unless the time is up or the result could be too large."""
        self.check_time()
        if args:
            self.charged(args)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, (str, bytes, int)):
            name = getattr(obj, "__name__", "")
            joined = args[0] if name == "join" and args else ()
            if isinstance(joined, Iterable) and not isinstance(joined, Collection):
                items: list[Any] = []  # a list can be checked before use
                for item in joined:
                    items.append(item)
                    self.expect(len(items) * 8)
                args = (items, *args[1:])
            self._expect_method(owner, name, [*args, *kwargs.values()])
        return self.charged(super().call(context, obj, *args, **kwargs))

    def _expect_method(self, owner: str | bytes | int, name: str, args: list[Any]) -> None:
        if isinstance(owner, int):
            self.expect(_largest(args))  # to_bytes
        elif name in ("center", "ljust", "rjust", "zfill"):
            self.expect(_largest(args) * _CHAR_BYTES)
        elif name == "expandtabs":
            self.expect(len(owner) * max(8, _largest(args)))
        elif name == "replace" and len(args) >= 2:
            self._expect_replaced(owner, *args[:2])
        elif name == "join" and args:
            if isinstance(args[0], (str, bytes)):
                self.expect(len(args[0]) * (1 + len(owner)))
            elif isinstance(args[0], Collection):
                sizes = [len(item) if isinstance(item, (str, bytes)) else 0 for item in args[0]]
                self.expect(sum(sizes) + len(sizes) * len(owner))
        elif name == "translate" and args and isinstance(args[0], (Mapping, Sequence)):
            table = args[0].values() if isinstance(args[0], Mapping) else args[0]
            widest = max((len(value) for value in table if isinstance(value, str)), default=1)
            self.expect(len(owner) * widest * _CHAR_BYTES)
        elif name in ("split", "rsplit", "splitlines"):
            separator = next((arg for arg in args if isinstance(arg, type(owner)) and arg), None)
            count = len(owner) // 2 if separator is None else owner.count(separator)  # type: ignore[arg-type]
            self.expect(count * _ITEM_BYTES)

    def _expect_replaced(self, text: Any, old: Any, new: Any) -> None:
        if isinstance(old, type(text)) and isinstance(new, type(text)):
            count = text.count(old) if old else len(text) + 1
            self.expect(len(text) + count * len(new))

    def _expect_printf(self, form: str, values: Any) -> None:
        if _PRINTF_STAR.search(form):
            raise Runaway("the chat template gives the width of a field as a value")
        # Any number may be a width: keys can have brackets in them, so only Python itself finds the fields.
        widths = sum(map(int, _DIGITS.findall(form)))
        # A mapping's value may be written by each of the fields.
        self.expect(len(form) + widths + form.count("%") * (_NUMBER_CHARS + self.text_chars(values)))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format` or `format_map` with a formatter that obeys the limits."""
        if super().wrap_str_format(value) is None:
            return None
        form = str(value.__self__)
        is_map = value.__name__ == "format_map"

        def format_(*args: Any, **kwargs: Any) -> str:
            formatter = _Formatter(self)
            return formatter.vformat(form, () if is_map else args, args[0] if is_map else kwargs)

        return format_

    # ----------------------------------------------------------------- filters

    def _limited(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter whose arguments are checked and whose result is charged."""
        leading = 0 if jinja2.utils._PassArg.from_obj(function) is None else 1

        @functools.wraps(function)
        def limited(*given: Any, **options: Any) -> Any:
            self.check_time()
            if len(given) > leading:
                self._expect_filter(name, given[leading], [*given[leading + 1 :], *options.values()])
            return self.charged(function(*given, **options))

        return limited

    def _expect_filter(self, name: str, value: Any, args: list[Any]) -> None:
        if name in _WRITES_TEXT:
            self.bounded(value)
        match name:
            case "center" | "batch" | "slice":
                self.expect(_largest(args) * 8)
            case "format":
                self._expect_printf(str(value), args)
            case "indent":
                widths = [len(arg) if isinstance(arg, str) else arg for arg in args]
                text = str(value)
                self.expect(len(text) + (1 + len(text.splitlines())) * _largest([4, *widths]))
            case "replace" if len(args) >= 2:
                self._expect_replaced(str(value), str(self.bounded(args[0])), str(self.bounded(args[1])))
            case "wordwrap" | "urlize" | "xmlattr":
                widest = max((len(arg) for arg in args if isinstance(arg, str)), default=1)
                self.expect(self.text_chars(value) * max(widest, 8))
            case "round" if _largest(args) > _ROUND_DIGITS:
                raise Runaway("the chat template rounds to too many digits")
            case "list" | "sort" | "unique" | "reverse" | "groupby" if isinstance(value, (str, bytes)):
                self.expect(len(value) * _ITEM_BYTES)
            case "sum":
                self.text_chars(value if isinstance(value, Collection) else None)

    @jinja2.utils.pass_eval_context
    def do_join(
        self,
        eval_ctx: jinja2.nodes.EvalContext,
        value: Iterable[Any],
        d: str = "",
        attribute: str | int | None = None,
    ) -> str:
        """Join values, as Jinja's own filter does; the size is checked after each."""
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(self, attribute), value)
        separator = str(self.bounded(d))
        parts: list[str] = []
        size = 0
        for item in value:
            parts.append(str(self.bounded(item)))
            size += len(parts[-1]) + len(separator)
            self.expect(size)
        return separator.join(parts)

    def do_tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Return a value as JSON. Jinja's own filter escapes HTML, which is wrong in a prompt."""
        depth = len(indent) if isinstance(indent, str) else indent or 0
        if max(depth, *map(len, separators or ("", ""))) > _JSON_INDENT:
            raise Runaway("the chat template indents JSON too far")
        self.expect(self.text_chars(value) * (6 if ensure_ascii else 1))
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )


class _Formatter(jinja2.sandbox.SandboxedFormatter, Formatter):
    """`str.format` in the sandbox; the size of each field is checked before it is written."""

    def __init__(self, environment: TemplateEnvironment) -> None:
        super().__init__(environment)
        self._limits = environment

    def format_field(self, value: Any, format_spec: str) -> str:
        """Format one field within the budget."""
        self._limits.bounded(value)
        self._limits.expect(_CHAR_BYTES * sum(map(int, _DIGITS.findall(format_spec))))
        text: str = self._limits.charged(super().format_field(value, format_spec))
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Convert one field (`!r`, `!s`, `!a`) within the budget."""
        return super().convert_field(self._limits.bounded(value), conversion)


def _items_of(value: object) -> Iterable[Any] | None:
    """Return the values inside a container; None for another value."""
    if isinstance(value, jinja2.utils.Namespace):
        value = value._Namespace__attrs
    if isinstance(value, Mapping):
        return (part for entry in value.items() for part in entry)
    # The text of a range is short. That of any other collection may contain its items.
    return value if isinstance(value, Collection) and not isinstance(value, range) else None


def _largest(args: Iterable[Any]) -> int:
    return max((arg for arg in args if isinstance(arg, int)), default=0)


def raise_exception(message: str) -> None:
    """Refuse the conversation with this message: a global function of templates."""
    raise TemplateError(str(message))


def strftime_now(form: str) -> str:
    """Return the present time in this form: a global function of templates."""
    if len(form) > _DATE_FORM_CHARS:
        raise Runaway("the chat template asks for too long a date")
    return datetime.now().strftime(form)  # noqa: DTZ005 - local time, as templates expect
