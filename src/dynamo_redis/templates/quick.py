"""Quick templates: those whose work is in proportion to the conversation.

Jinja's syntax tree tells. A template is quick if it uses only the operations that are named here. Each of
them takes a time in proportion to its operands; the sandbox limits the sizes of these, and checks the time
between two operations, and before a comparison whose sides can both be large. No list can be made of lists,
so a comparison takes no longer than its texts are long. A few methods take a time in proportion to a product:
their arguments are short constants. Recursive loops, powers, products and most filters are not among these
operations.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from jinja2 import nodes

from dynamo_redis.templates.sandbox import TemplateEnvironment

_OTHERS: Final = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.Assign, nodes.ExprStmt),
    *(nodes.Break, nodes.Continue, nodes.Macro, nodes.NSRef, nodes.Const, nodes.Getattr, nodes.Getitem),
    *(nodes.Slice, nodes.CondExpr, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not, nodes.Neg),
    *(nodes.Add, nodes.Sub, nodes.Mod, nodes.Concat, nodes.Keyword),
    nodes.EnvironmentAttribute,  # the sandbox's own check of the time
)
_CONSTANT: Final = (nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair)

_NAMES_OF_LISTS: Final = {"caller", "kwargs", "varargs"}
"""Names inside a macro that gather its arguments."""

_FUNCTIONS: Final = {"namespace", "raise_exception", "strftime_now"}
_METHODS: Final = {
    *("endswith", "find", "get", "index", "items", "keys", "lower", "replace", "split", "splitlines"),
    *("startswith", "title", "upper", "values"),
}
_METHODS_OF_BOTH: Final = {"lstrip", "rsplit", "rstrip", "strip"}
"""Methods that take a time in proportion to the product of the text's and the argument's lengths."""

_LONGEST_ARGUMENT_CHARS: Final = 32
"""The longest constant argument of such a method."""

_FILTERS: Final = {
    *("capitalize", "count", "d", "default", "first", "int", "items", "join", "last", "length", "list"),
    *("lower", "replace", "safe", "string", "title", "tojson", "trim", "upper"),
}
_TESTS: Final = {  # none that compares: the time is checked before the operators only
    *("boolean", "defined", "divisibleby", "even", "false", "float", "integer", "iterable", "lower"),
    *("mapping", "none", "number", "odd", "sequence", "string", "true", "undefined", "upper"),
}

_LONGEST_CHARS: Final = 64 << 10


def is_quick(source: str) -> bool:
    """Return whether a template takes a time in proportion to the conversation.

    False if it is over 64 Ki characters long or does not compile.
    """
    if len(source) > _LONGEST_CHARS:
        return False
    try:
        tree = TemplateEnvironment().parse(source)
    except Exception:  # noqa: BLE001 - Jinja's own errors, and Python's for too deep nesting
        return False
    callable_names = _FUNCTIONS.union(macro.name for macro in tree.find_all(nodes.Macro))
    return all(_is_quick(node, callable_names) for node in _walk(tree))


def _walk(tree: nodes.Node) -> Iterator[nodes.Node]:
    """Yield all nodes, but those inside constants."""
    pending = [tree]
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)):
            pending.extend(node.iter_child_nodes())


def _is_quick(node: nodes.Node, callable_names: Collection[str]) -> bool:
    match node:
        case nodes.Name():
            return node.name not in _NAMES_OF_LISTS
        case nodes.List() | nodes.Tuple() | nodes.Dict():
            return all(isinstance(each, _CONSTANT) for each in node.find_all(nodes.Node)) or _is_target(node)
        case nodes.For():
            return not node.recursive
        case nodes.Call():
            return (
                node.dyn_args is None
                and node.dyn_kwargs is None
                and (_is_quick_callee(node.node, callable_names) or _is_quick_method(node))
            )
        case nodes.Filter():
            return (
                node.dyn_args is None
                and node.dyn_kwargs is None
                and node.name in _FILTERS
                and (node.name != "trim" or _has_short_arguments(node))
            )
        case nodes.Test():
            return node.name in _TESTS
        case _:
            return isinstance(node, _OTHERS)


def _is_quick_callee(callee: nodes.Node, names: Collection[str]) -> bool:
    match callee:
        case nodes.Name():
            return callee.name in names
        case nodes.Getattr():
            return callee.attr in _METHODS
        case _:
            return isinstance(callee, nodes.EnvironmentAttribute)


def _is_quick_method(call: nodes.Call) -> bool:
    callee = call.node
    return (
        isinstance(callee, nodes.Getattr) and callee.attr in _METHODS_OF_BOTH and _has_short_arguments(call)
    )


def _has_short_arguments(call: nodes.Call | nodes.Filter) -> bool:
    """Return whether all arguments are constants, and short ones if they are texts."""
    values = [*call.args, *(keyword.value for keyword in call.kwargs)]
    return all(
        isinstance(value, nodes.Const)
        and (not isinstance(value.value, str) or len(value.value) <= _LONGEST_ARGUMENT_CHARS)
        for value in values
    )


def _is_target(node: nodes.Node) -> bool:
    """Return whether this is the left side of `for key, value in …`."""
    return isinstance(node, nodes.Tuple) and node.ctx == "store"
