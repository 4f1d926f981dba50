"""The options that say where the weights are: on which ranks, and from where they come.

Parts of `core.config.Config`, declared as the others there.
"""

import dataclasses

from headrace.core.errors import BadRequest
from headrace.core.option import option

LOAD_FORMATS = (
    "auto",
    "safetensors",
    "pt",
    "npcache",
    "mistral",
    "gguf",
    "bitsandbytes",
    "layered",
    "sharded_state",
    "remote",
    "remote_instance",
    "runai_streamer",
    "fastsafetensors",
    "dummy",
)


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
    nnodes: int = option(
        1, "Machines that the ranks are on; each has a server of its own.", minimum=1, maximum=64
    )
    node_rank: int = option(
        0, "Number of this machine; 0 has the scheduler and takes requests.", minimum=0
    )
    dist_init_addr: str = option(
        "", "host:port on machine 0 where ranks of several machines find each other."
    )
    base_gpu_id: int = option(
        0, "Device number of a machine's first rank; the CPU device shows it only.", minimum=0
    )
    gpu_id_step: int = option(
        1, "From one rank's device number to the next; the CPU device shows it only.", minimum=1
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

    @property
    def ranks_here(self) -> range:
        """The ranks that this machine holds; `dist.topology.Grid` lays them out."""
        count = max(1, self.ranks // self.nnodes)
        return range(self.node_rank * count, (self.node_rank + 1) * count)


def host_and_port(address: str) -> tuple[str, int]:
    """Of `host:port`, or `[host]:port` for IPv6.

    Raises:
        BadRequest: --dist-init-addr is neither.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadRequest(
            f"--dist-init-addr must be host:port, not {address!r}", field="dist_init_addr"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """How weights come from where they are; see docs/loading.md."""

    model_loader_extra_config: str = option(
        "{}", "JSON object of settings that only one load format has."
    )
    model_checksum: str = option(
        "", "File of SHA-256 sums (of sha256sum, or JSON) that every file must have."
    )
    weight_loader_disable_mmap: bool = option(
        False, "Read files instead of mapping them: better on network file systems."
    )
    weight_loader_prefetch_checkpoints: bool = option(
        False, "Read files into the page cache ahead of the loader."
    )
    weight_loader_prefetch_num_threads: int = option(
        4, "Threads that prefetch.", minimum=1, maximum=64
    )
    weight_loader_drop_cache_after_load: bool = option(
        False, "Give the page cache of the files back when they are loaded."
    )
    remote_instance_weight_loader_start_seed: bool = option(
        False, "Let other servers take this server's weights (format remote_instance)."
    )
    remote_instance_weight_loader_seed_instance_ip: str = option(
        "", "Address of the server that format remote_instance takes its weights from."
    )
    remote_instance_weight_loader_seed_instance_service_port: int = option(
        30000, "HTTP port of that server.", minimum=1, maximum=65535
    )
    remote_instance_weight_loader_send_weights_group_ports: str = option(
        "", "Ports to receive on, one for each rank, with commas between; empty takes free ones."
    )
