"""From what a request asks for to xgrammar's language, or a refusal.

xgrammar is lax: it ignores what it does not know. So only what the default backend enforces is
let in (`source.translate`, with all its checks), then rewritten to the part of the language that
was verified; the rest is refused. The program is always one structural tag. Pure.
"""

import copy
import json
from collections.abc import Mapping
from typing import Any

from headrace.grammar import ebnf, regex, schema, schema_xgrammar, source, tags
from headrace.grammar.refusal import Refused, step

Format = dict[str, Any]

_ONLY = "not supported with the grammar backend xgrammar"
# Of white space between the tokens of JSON.
_SPACES = 2


def translate(field: str, text: str, specials: Mapping[str, int]) -> str:
    """A grammar for the engine, as a structural tag in JSON. `specials`: as in `source.translate`.

    Raises:
        Refused: names the field and the place in it.
    """
    source.translate(field, text, specials)
    if field == "json_schema":
        found = _schema(schema.parse(text, field), field, "")
    elif field == "structural_tag":
        found = _Tags(specials).write(*tags.read(text))
    elif field == "ebnf":
        found = _grammar(text, field, "")
    else:
        found = _regex(text, field, "")
    return json.dumps({"type": "structural_tag", "format": found})


def _schema(value: Any, field: str, at: str) -> Format:
    prepared = schema.prepare_value(copy.deepcopy(value), field, at, exclusive=True)
    return {
        "type": "json_schema",
        "json_schema": schema_xgrammar.rewrite(prepared, field, at),
        "max_whitespace_cnt": _SPACES,
    }


def _regex(pattern: str, field: str, place: str) -> Format:
    try:
        tree = regex.whole(regex.parse(pattern))
    except regex.UnknownSyntax as error:
        raise Refused(field, f"{error} (with the grammar backend xgrammar)", place) from None
    return {"type": "grammar", "grammar": f"root ::= {_tree(tree)}"}


def _grammar(text: str, field: str, place: str) -> Format:
    rules = ebnf.read(text, field)
    names = {name: "root" if name == "root" else f"r{i}" for i, name in enumerate(rules)}
    sizes = [_size(node) for node, _ in rules.values()]
    for (_, line), size in zip(rules.values(), sizes, strict=True):
        if size > regex.MAX_SIZE:
            why = f"repetitions make a rule larger than {regex.MAX_SIZE}, which is {_ONLY}"
            raise Refused(field, why, place or line)
    lines = [f"{names[name]} ::= {_node(node, names)}" for name, (node, _) in rules.items()]
    return {"type": "grammar", "grammar": "\n".join(lines)}


class _Tags:
    """Turns a tree of structural tags, which was checked, into the engine's own."""

    def __init__(self, specials: Mapping[str, int]) -> None:
        self._specials = specials

    def write(self, node: Format, at: str) -> Format:
        kind = node["type"]
        if kind == "any_text":
            return {"type": "any_text"}
        if kind == "const_string":
            return self._text(node["value"], step(at, "value"))
        if kind == "json_schema":
            return _schema(node["json_schema"], tags.FIELD, step(at, "json_schema"))
        if kind == "regex":
            return _regex(node["pattern"], tags.FIELD, step(at, "pattern"))
        if kind == "grammar":
            return _grammar(node["grammar"], tags.FIELD, step(at, "grammar"))
        if kind == "tag":
            return self._tag(node, at)
        if kind in ("sequence", "or"):
            place = step(at, "elements")
            parts = [self.write(one, step(place, i)) for i, one in enumerate(node["elements"])]
            return {"type": kind, "elements": parts}
        place = step(at, "tags")
        found = [self._tag(one, step(place, i)) for i, one in enumerate(node["tags"])]
        for name in ("triggers", "separator"):
            for text in node.get(name, []) if name == "triggers" else [node.get(name, "")]:
                self._text(text, step(at, name))
        return {**node, "tags": found}

    def _tag(self, node: Format, at: str) -> Format:
        for name in ("begin", "end"):
            self._text(node[name], step(at, name))
        content = self.write(node["content"], step(at, "content"))
        return {"type": "tag", "begin": node["begin"], "content": content, "end": node["end"]}

    def _text(self, text: str, place: str) -> Format:
        for name in self._specials:
            if name and name in text:
                raise Refused(tags.FIELD, f"the special token {name!r} is {_ONLY}", place)
        return {"type": "const_string", "value": text}


def _node(node: ebnf.Node, names: Mapping[str, str]) -> str:
    """A node of a grammar in the engine's notation."""
    kind = node[0]
    if kind == "text":
        return _string(node[1])
    if kind == "set":
        return _tree(regex.ANY if node[1] == ebnf.ANY else regex.whole(regex.parse(node[1])))
    if kind == "name":
        return names[node[1]]
    if kind == "times":
        return f"({_node(node[1], names)}){node[2]}"
    parts = [_node(child, names) for child in node[1]]
    return f"({(' | ' if kind == 'any' else ' ').join(parts)})" if parts else '""'


def _size(node: ebnf.Node) -> int:
    """How large a node is once repetitions are written out."""
    if node[0] == "times":
        counts = [int(part) for part in node[2].strip("{}*+?").split(",") if part]
        return _size(node[1]) * max(1, *counts, 0)
    return 1 + sum(_size(child) for child in node[1]) if node[0] in ("all", "any") else 1


def _tree(tree: regex.Tree) -> str:
    """A regular expression in the engine's notation."""
    if isinstance(tree, regex.Characters):
        return f"[{''.join(f'{_code(low)}-{_code(high)}' for low, high in tree.ranges)}]"
    if isinstance(tree, regex.Times):
        inside = _tree(tree.inside)
        return (
            f"({inside}){tree.mark}" if isinstance(tree.inside, regex.Times) else inside + tree.mark
        )
    if isinstance(tree, regex.Sequence):
        return f"({' '.join(map(_tree, tree.parts))})" if tree.parts else '""'
    return f"({' | '.join(map(_tree, tree.branches))})"


def _string(text: str) -> str:
    return '"' + "".join(_code(ord(char)) for char in text) + '"'


def _code(point: int) -> str:
    return f"\\U{point:08X}"
