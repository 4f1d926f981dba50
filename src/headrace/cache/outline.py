"""A small picture of the radix tree for people: its most used nodes, and how much is left out.

Nodes in use come first, then the largest; a node is shown only if its parent is. The work is
bounded by the number of nodes shown and by `_WIDEST`, whatever the size of the tree.
"""

import heapq
import itertools
from typing import NamedTuple

from headrace.cache.radix import Node, RadixCache

# Children of one node that are looked at.
_WIDEST = 2048
# Token ids that name a node.
_SHOWN_IDS = 12


class OutlineNode(NamedTuple):
    """One shown node. `parent` is an index into the outline, -1 below a root.

    `locks` counts the requests that use it, `hits` those that found it; `hidden` its children that
    are not shown; `ids` the first tokens of its run.
    """

    parent: int
    tokens: int
    locks: int
    hits: int
    hidden: int
    ids: list[int]


def outline(cache: RadixCache, limit: int) -> list[OutlineNode]:
    """At most `limit` nodes, parents before children."""
    order = itertools.count()
    heap: list[tuple[int, int, int, int, Node]] = []

    def offer(node: Node, parent: int) -> None:
        for child in itertools.islice(node.children.values(), _WIDEST):
            heapq.heappush(heap, (-child.locks, -len(child.tokens), next(order), parent, child))

    for root in itertools.islice(cache.roots(), _WIDEST):
        offer(root, -1)
    shown: list[OutlineNode] = []
    children: list[int] = []
    while heap and len(shown) < limit:
        _, _, _, parent, node = heapq.heappop(heap)
        if parent >= 0:
            children[parent] += 1
        offer(node, len(shown))
        children.append(0)
        shown.append(
            OutlineNode(
                parent,
                len(node.tokens),
                node.locks,
                node.hits,
                len(node.children),
                node.tokens[:_SHOWN_IDS].tolist(),
            )
        )
    return [
        node._replace(hidden=node.hidden - count)
        for node, count in zip(shown, children, strict=True)
    ]


def shared_pages(cache: RadixCache) -> int:
    """Pages of the tree that several requests use. A node has at least its children's locks."""
    found = 0
    stack: list[Node] = list(cache.roots())
    while stack:
        node = stack.pop()
        found += len(node.pages)
        stack += (child for child in node.children.values() if child.locks > 1)
    return found
