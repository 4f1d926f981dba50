"""The options that say where the weights are: on which ranks, and from where they come.

Parts of `core.config.Config`, declared as the others there.
"""

import dataclasses

from headrace.core.option import option


@dataclasses.dataclass(frozen=True)
class ParallelOptions:
    """How the model is split over ranks; see docs/parallel.md."""

    tp_size: int = option(
        1, "Ranks that each hold a part of every layer.", aliases=("--tp",), minimum=1, maximum=64
    )
    pp_size: int = option(
        1, "Stages that each hold some of the layers.", aliases=("--pp",), minimum=1, maximum=64
    )
    ep_size: int = option(
        1,
        "Groups of ranks that experts are dealt to; divides tp-size.",
        aliases=("--ep",),
        minimum=1,
    )
    deterministic_tp: int = option(
        0,
        "Cut sums into this many parts, a power of two: every tp-size that divides it gives the "
        "same bits. 0: off.",
        minimum=0,
        maximum=64,
    )
    dist_timeout: int = option(
        600, "Seconds that ranks wait for each other while the model is loaded.", minimum=1
    )
    cpu_offload_gb: float = option(
        0.0, "GiB of weights kept in host memory; on the CPU device all of them are.", minimum=0.0
    )

    @property
    def ranks(self) -> int:
        return self.tp_size * self.pp_size
