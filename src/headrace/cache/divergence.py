"""Where a prompt left one that is stored. Reads the prefix tree, changes nothing.

A prompt that should have been a hit and was not has often one changed token near its beginning: a
date, a counter, another order of tools. The tree has stopped matching at a node; what hangs below
it says at which token, and after whose request.
"""

from itertools import islice

import numpy as np

from headrace.cache.radix import Node, common_length

# Branches below a node that are looked at.
_BRANCHES = 64


def divergence(node: Node, rest: np.ndarray) -> tuple[int, str] | None:
    """How many tokens of `rest`, the prompt beyond `node`, a stored prompt shares with it before it
    goes on differently, and the request that left it there; None if none does."""
    shared, owner = -1, ""
    for branch in islice(node.children.values(), _BRANCHES):
        common = common_length(branch.tokens, rest)
        if common == min(len(branch.tokens), len(rest)):
            return None  # one is the beginning of the other
        if common > shared:
            shared, owner = common, branch.owner
    return (shared, owner) if owner else None
