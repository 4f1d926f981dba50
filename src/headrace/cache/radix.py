"""RadixCache: stored prefixes as a tree whose edges are runs of pages.

Each namespace (extra key, salt, adapter) has its own root. An edge is cut where two prompts part,
always at a page border. A lock on a node protects the path to its root. Time is a counter, so
that equal request orders give equal trees. Knows nothing of requests or devices.

Source: Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model Programs",
section 3 (RadixAttention).
"""

import heapq
from collections.abc import Callable, Iterator

import numpy as np

from headrace.cache.prefix import Prefix

# A node reused this often is "protected" for the segmented policy (slru).
_PROTECTED_HITS = 2
# Evict at least this many pages at once: collecting candidates costs more than freeing them.
_EVICT_AT_LEAST = 16


class Node:
    """A run of tokens (whole pages) below `parent`, and the pages that hold them."""

    __slots__ = (
        "children", "created", "hits", "locks", "namespace", "owner", "pages", "parent",
        "priority", "tokens", "used",
    )  # fmt: skip

    def __init__(
        self, parent: "Node | None", namespace: str, tokens: np.ndarray, pages: list[int], now: int
    ) -> None:
        self.parent = parent
        self.namespace = namespace
        self.tokens = tokens
        self.pages = pages
        self.children: dict[bytes, Node] = {}
        self.locks = 0
        self.created = now
        self.used = now
        self.hits = 0
        self.priority = 0
        # The request that left it here.
        self.owner = ""


EvictionKey = Callable[[Node], tuple[int, int]]
# The smallest key is evicted first.
POLICIES: dict[str, EvictionKey] = {
    "lru": lambda node: (node.used, 0),
    "lfu": lambda node: (node.hits, node.used),
    "fifo": lambda node: (node.created, 0),
    "mru": lambda node: (-node.used, 0),
    "filo": lambda node: (-node.created, 0),
    "slru": lambda node: (int(node.hits >= _PROTECTED_HITS), node.used),
    "priority": lambda node: (node.priority, node.used),
}


class RadixCache:
    """Prefix cache over a radix tree; see `PrefixCache` for the contract of each method."""

    shares = True

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        self.page_size = page_size
        self._key = POLICIES[policy]
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self._locked_pages = 0
        self._held = 0

    @property
    def held(self) -> int:
        return self._held

    @property
    def evictable(self) -> int:
        return self._held - self._locked_pages

    @property
    def namespaces(self) -> int:
        """How many prompts begin anew at a root of their own."""
        return len(self._roots)

    def match(self, namespace: str, tokens: np.ndarray, *, use: bool = True) -> Prefix:
        pages: list[int] = []
        node = self._root(namespace)
        for child in self._walk(node, tokens):
            if use:
                child.hits += 1
                child.used = self._tick()
            pages += child.pages
            node = child
        return Prefix(pages, node)

    def insert(
        self,
        namespace: str,
        tokens: np.ndarray,
        pages: list[int],
        priority: int,
        owner: str = "",
    ) -> Prefix:
        size = self.page_size
        tokens = tokens[: len(tokens) // size * size]
        kept: list[int] = []
        node = self._root(namespace)
        for child in self._walk(node, tokens):
            child.priority = max(child.priority, priority)
            child.used = self._tick()
            kept += child.pages
            node = child
        rest = tokens[len(kept) * size :]
        if len(rest):
            fresh = pages[len(kept) : len(tokens) // size]
            leaf = Node(node, namespace, rest.copy(), fresh, self._tick())
            leaf.priority, leaf.owner = priority, owner
            node.children[rest[:size].tobytes()] = leaf
            self._held += len(fresh)
            kept += fresh
            node = leaf
        return Prefix(kept, node)

    def lock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            if at.locks == 0:
                self._locked_pages += len(at.pages)
            at.locks += 1
            at = at.parent

    def unlock(self, node: Node) -> None:
        at: Node | None = node
        while at is not None:
            at.locks -= 1
            assert at.locks >= 0, "unlocked more often than locked"
            if at.locks == 0:
                self._locked_pages -= len(at.pages)
            at = at.parent

    def evict(self, count: int) -> list[int]:
        wanted = max(count, _EVICT_AT_LEAST)
        heap = [(self._key(leaf), leaf.created, leaf) for leaf in self._leaves()]
        heapq.heapify(heap)
        freed: list[int] = []
        while heap and len(freed) < wanted:
            _, _, leaf = heapq.heappop(heap)
            freed += leaf.pages
            parent = self._remove(leaf)
            if parent.parent is not None and not parent.children and parent.locks == 0:
                heapq.heappush(heap, (self._key(parent), parent.created, parent))
        return freed

    def clear(self) -> list[int]:
        return self.evict(self._held) if self._held else []

    def roots(self) -> Iterator[Node]:
        """The root of each namespace; it holds no tokens."""
        return iter(self._roots.values())

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.parent is not None:
                yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Assert the counters against the tree (tests and idle checks)."""
        held = locked = 0
        for node in self.nodes():
            assert len(node.tokens) == len(node.pages) * self.page_size > 0
            assert node.parent is not None
            assert node.parent.locks >= node.locks
            held += len(node.pages)
            locked += len(node.pages) if node.locks else 0
        assert (held, locked) == (self._held, self._locked_pages), "page counters are wrong"

    def _root(self, namespace: str) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = Node(None, namespace, np.empty(0, np.int32), [], self._tick())
            self._roots[namespace] = root
        return root

    def _walk(self, node: Node, tokens: np.ndarray) -> Iterator[Node]:
        """Follow `tokens` down from `node`, splitting the last edge where they part."""
        size = self.page_size
        position = 0
        while position + size <= len(tokens):
            child = node.children.get(tokens[position : position + size].tobytes())
            if child is None:
                return
            common = common_length(child.tokens, tokens[position:]) // size * size
            if common < len(child.tokens):
                child = self._split(child, common)
            yield child
            position += common
            node = child

    def _split(self, node: Node, length: int) -> Node:
        """Cut `node` after `length` tokens; returns the new upper part."""
        size = self.page_size
        assert node.parent is not None
        upper = Node(
            node.parent, node.namespace, node.tokens[:length], node.pages[: length // size], 0
        )
        upper.locks, upper.hits, upper.priority = node.locks, node.hits, node.priority
        upper.created, upper.used, upper.owner = node.created, node.used, node.owner
        node.parent.children[upper.tokens[:size].tobytes()] = upper
        node.parent = upper
        node.tokens = node.tokens[length:]
        node.pages = node.pages[length // size :]
        upper.children[node.tokens[:size].tobytes()] = node
        return upper

    def _leaves(self) -> Iterator[Node]:
        return (node for node in self.nodes() if not node.children and node.locks == 0)

    def _remove(self, leaf: Node) -> Node:
        """Detach an unlocked leaf; returns its parent."""
        parent = leaf.parent
        assert parent is not None and leaf.locks == 0
        del parent.children[leaf.tokens[: self.page_size].tobytes()]
        self._held -= len(leaf.pages)
        if parent.parent is None and not parent.children and parent.locks == 0:
            del self._roots[parent.namespace]
        return parent

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements of two int32 arrays are equal."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length
