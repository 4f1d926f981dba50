"""The weights of a mixture of experts in the form that one implementation multiplies with.

Made once by `ops.pack_experts`; knows neither routers nor models.
"""

from dataclasses import dataclass
from typing import Any

from headrace.ops.packed import PackedWeight


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """Each expert's gate and up [inner, hidden] and down [hidden, inner].

    `handle`: what the implementation keeps beside them.
    """

    gates: tuple[PackedWeight, ...]
    ups: tuple[PackedWeight, ...]
    downs: tuple[PackedWeight, ...]
    handle: Any = None
