"""Where the reasoning of a model stands in what it writes: one row per family, one grammar.

Reasoning is a block at the start of the text. Either the model opens it itself, or the prompt has
done so. Line breaks around the block are layout. Without an end mark all of an opened block is
reasoning; without a block all text is content.
"""

from dataclasses import dataclass

from headrace.text.parsers.calls import Grammar
from headrace.text.parsers.source import SPACE, Out, Source, Wait


@dataclass(frozen=True)
class Block:
    """The marks of a block. `opened`: what comes first belongs to it even without a mark.
    `usual`: the model always writes a block unless it is told not to reason."""

    begin: tuple[str, ...] = ("<think>",)
    end: tuple[str, ...] = ("</think>",)
    opened: bool = False
    layout: str = "\n"
    usual: bool = False


THINK = Block()
THINK_USUAL = Block(usual=True)
THINK_OPENED = Block(opened=True, usual=True)
KIMI = Block(("\u25c1think\u25b7",), ("\u25c1/think\u25b7",), usual=True)
MISTRAL = Block(("[THINK]",), ("[/THINK]",))
GEMMA4 = Block(("<|channel>thought",), ("<channel|>",))
GRANITE = Block(
    ("Here is my thought process:", "Here's my thought process:"),
    ("Here is my response:", "Here's my response:"),
    layout=SPACE,
)


def split_reasoning(block: Block, opened: bool, interrupts: tuple[str, ...] = ()) -> Grammar:
    """`opened`: the text begins inside the block. A mark of `interrupts` ends it too, and stays:
    models call tools without closing their reasoning."""

    def grammar(source: Source, out: Out) -> Wait[None]:
        yield from source.spaces()
        if (yield from source.match(block.begin)) or opened:
            source.drop()
            yield from _skip(source, block.layout)
            marks = block.end + interrupts
            found = yield from source.until(marks, out.reasoning, block.layout)
            yield from source.match(block.end)
            source.drop()
            if found in block.end:
                yield from _skip(source, block.layout)
        out.content(source.recall())
        yield from source.rest(out.content)

    return grammar


def _skip(source: Source, layout: str) -> Wait[None]:
    while (yield from source.more()) and source.text[source.at] in layout:
        source.give(source.at + 1)
