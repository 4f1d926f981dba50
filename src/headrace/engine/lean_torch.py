"""Imports torch without what only tracing needs: a quarter of the time that a start waits for.

`torch._meta_registrations` and what it pulls in (decompositions, reference operators) describe
operators to torch.compile and to tensors without data; operators that run never ask for them. While
torch is imported an empty module stands in its place; who imports it later gets the real one.
"""

import sys
from types import ModuleType

_NOT_YET = "torch._meta_registrations"

if "torch" not in sys.modules:
    _stand_in = sys.modules[_NOT_YET] = ModuleType(_NOT_YET)
    try:
        import torch
    finally:
        if sys.modules.get(_NOT_YET) is _stand_in:
            del sys.modules[_NOT_YET]
    # As an attribute of the package it would still be found.
    if getattr(torch, "_meta_registrations", None) is _stand_in:
        del torch._meta_registrations
