"""One chat template: compiled in a sandbox, with what its syntax tree says about its input.

The environment has the tags, filters and globals that transformers gives chat templates, so that
the prompt is the same string. Templates come from model folders: the sandbox keeps them from
running code, limits bound what they print and how long they take (looked at whenever a template
prints, calls, reads an attribute or begins another round of a loop). Does not know where templates
come from or what a request looks like.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from headrace.core.errors import BadRequest, LoadError
from headrace.text.template_limits import (
    MAX_CHARS,
    bounded,
    check_format,
    check_method,
    check_percent,
    check_size,
)

MAX_TEMPLATE_CHARS = 1 << 20
MAX_PROMPT_CHARS = MAX_CHARS
MAX_RENDER_SECONDS = 5.0
_MAX_EXPONENT = 64

# What expressions of a template raise when messages do not have the shape it expects.
_RENDER_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class ChatTemplate:
    """A compiled template. Safe to share between threads.

    `content_format` is "openai" if it walks over the parts of a message's content, else "string".
    `takes_string_content`: it also handles content that is a string. `supports_tools`: it reads
    `tools`. `string_arguments`: it prints the arguments of a tool call as they are, so they must
    be JSON text. `source` is its text.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise LoadError(
                f"the chat template has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}"
            )
        self.source = source
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._compiled = environment.from_string(_Watched().visit(environment.parse(source)))
        except TemplateSyntaxError as error:
            raise LoadError(
                f"the chat template has an error in line {error.lineno}: {error.message}"
            ) from error
        self.content_format: Literal["string", "openai"] = (
            "openai" if _loops_over_content(tree) else "string"
        )
        self.takes_string_content = self.content_format == "string" or any(
            test.name == "string" for test in tree.find_all(nodes.Test)
        )
        self.supports_tools = "tools" in meta.find_undeclared_variables(tree)
        self.string_arguments = _prints_arguments(tree)

    def render(self, variables: dict[str, Any]) -> str:
        """The prompt. Whatever goes wrong is a `BadRequest` that says what the template did not
        like."""
        pieces, size = [], 0
        _clock.deadline = time.monotonic() + min(MAX_RENDER_SECONDS, _clock.patience)
        try:
            for piece in self._compiled.generate(variables):
                size += len(piece)
                _check_time()
                if size > MAX_PROMPT_CHARS:
                    raise BadRequest(
                        f"the chat template made more than {MAX_PROMPT_CHARS} characters",
                        field="messages",
                    )
                pieces.append(piece)
        except _RENDER_ERRORS as error:
            raise BadRequest(_explain(error), field="messages") from error
        return "".join(pieces)


def _explain(error: Exception) -> str:
    if isinstance(error, SecurityError):
        return f"the chat template was stopped by its sandbox: {error}"
    if isinstance(error, UndefinedError):
        return f"the chat template needs something that the messages do not have: {error}"
    if isinstance(error, TemplateError):
        return f"the chat template refused the messages: {error}"
    return f"the chat template cannot use these messages: {type(error).__name__}: {error}"


class _GenerationTag(Extension):
    """`{% generation %}` marks assistant text for training; serving only scopes its variables."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TakesLong(Exception):
    """Rendering ran out of the patience of its caller, not out of its own limit."""


class _Clock(threading.local):
    """When the rendering of this thread has to be over."""

    deadline = math.inf
    patience = math.inf


_clock = _Clock()


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Let templates that this thread renders raise `TakesLong` after so many seconds.

    For an event loop, which can then have it rendered in a thread.
    """
    _clock.patience = seconds
    try:
        yield
    finally:
        _clock.patience = math.inf


def _check_time() -> None:
    if time.monotonic() <= _clock.deadline:
        return
    if _clock.patience < MAX_RENDER_SECONDS:
        raise TakesLong
    raise BadRequest(f"the chat template took more than {MAX_RENDER_SECONDS:g} s", field="messages")


def _join(*parts: Any) -> str:
    """What `~` makes."""
    texts = [str(part) for part in parts]
    check_size(sum(map(len, texts)))
    return "".join(texts)


class _Watched(NodeTransformer):
    """Lets loops look at the clock and `~` at the size of what it makes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_own_call("check_time", [], node.lineno)))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _own_call("join", node.nodes, node.lineno)


def _own_call(name: str, args: list[nodes.Expr], line: int) -> nodes.Call:
    """A call of a function of the environment, which templates cannot name."""
    function = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(function, args, [], None, None, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a limit of time, and of what one operator may make."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    check_time = staticmethod(_check_time)
    join = staticmethod(_join)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
        counts = [x for x in (left, right) if isinstance(x, int)]
        if operator == "+":
            check_size(sum(sizes))
        elif operator == "%":
            check_percent(left, right)
        elif sizes and counts:
            check_size(sizes[0] * counts[0])
        if operator == "**" and counts and abs(counts[-1]) > _MAX_EXPONENT:
            raise SecurityError(f"a power of {counts[-1]}")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_time()
        if obj is _check_time:
            return None
        check_method(obj, args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, *args, **kwargs)
            return formatted(*args, **kwargs)

        return checked

    def getattr(self, obj: Any, attribute: str) -> Any:
        _check_time()
        return super().getattr(obj, attribute)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters |= bounded(environment.filters)
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    # The class itself would hand templates its attributes; its call is all they need.
    environment.globals["dict"] = _make_dict
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes <, >, & and ', which would change the prompt."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _loops_over_content(tree: nodes.Template) -> bool:
    """Whether some loop walks over message content, directly or through a variable or macro
    argument."""
    names = {
        arg.name
        for macro in tree.find_all(nodes.Macro)
        for arg in macro.args
        if arg.name == "content"
    }
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(expression: nodes.Node | None, names: set[str]) -> bool:
    if isinstance(expression, nodes.Name):
        return expression.name in names
    if isinstance(expression, nodes.Filter):
        return _is_content(expression.node, names)
    if isinstance(expression, nodes.Getitem) and isinstance(expression.arg, nodes.Slice):
        return _is_content(expression.node, names)
    return expression is not None and _reads_key(expression, "content")


def _prints_arguments(tree: nodes.Template) -> bool:
    """Whether tool call arguments are printed or joined to strings as they are, and never as
    JSON."""
    printed = any(
        _reads_key(part, "arguments")
        for kind in (nodes.Output, nodes.Concat, nodes.Add)
        for parent in tree.find_all(kind)
        for part in parent.iter_child_nodes()
    )
    return printed and not any(_reads_key(part, "arguments") for part in _tojson_inputs(tree))


def _tojson_inputs(tree: nodes.Template) -> Iterator[nodes.Node]:
    for node in tree.find_all(nodes.Filter):
        if node.name == "tojson" and node.node is not None:
            yield node.node


def _reads_key(expression: nodes.Node, key: str) -> bool:
    """`x.key` or `x["key"]`."""
    if isinstance(expression, nodes.Getattr):
        return expression.attr == key
    return (
        isinstance(expression, nodes.Getitem)
        and isinstance(expression.arg, nodes.Const)
        and expression.arg.value == key
    )
