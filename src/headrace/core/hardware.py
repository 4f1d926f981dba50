"""What this process may use: cores, memory, devices. Reads the cgroup, not the host.

Pure functions over /proc and /sys with an injectable root, so that tests can fake a machine.
"""

import math
import os
from pathlib import Path

import msgspec


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """`cores`: usable CPU cores (affinity and cgroup quota). Memory in bytes.

    `memory_limit` is the cgroup limit or the machine's memory, `memory_available` what of it is
    not in use (page cache counts as free). `bf16`: the CPU multiplies bfloat16 natively.
    """

    cores: int
    memory_limit: int
    memory_available: int
    bf16: bool = False


def detect(root: Path = Path("/")) -> Hardware:
    """Look at the machine under `root` (a fake tree in tests)."""
    total, available = _meminfo(root)
    limit, used = _cgroup_memory(root)
    if limit is not None and limit < total:
        total, available = limit, max(0, min(available, limit - used))
    return Hardware(
        cores=_cores(root),
        memory_limit=total,
        memory_available=available,
        bf16="avx512_bf16" in _cpu_flags(root) or "amx_bf16" in _cpu_flags(root),
    )


def node_cores(node: int, root: Path = Path("/")) -> set[int]:
    """The CPU cores of a NUMA node; empty if there is no such node."""
    cores: set[int] = set()
    for part in _read(root / f"sys/devices/system/node/node{node}/cpulist").strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            cores.update(range(int(first), int(last or first) + 1))
    return cores


def _cpu_flags(root: Path) -> set[str]:
    for line in _read(root / "proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _cores(root: Path) -> int:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cgroup_quota(root)
    return max(1, min(usable or 1, math.ceil(quota) if quota else usable or 1))


def _meminfo(root: Path) -> tuple[int, int]:
    fields: dict[str, int] = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdigit():
            fields[name] = int(number[0]) * 1024
    total = fields.get("MemTotal", 8 << 30)
    return total, fields.get("MemAvailable", fields.get("MemFree", total))


def _cgroup_memory(root: Path) -> tuple[int | None, int]:
    """(limit, bytes in use without reclaimable page cache) of cgroup v2, else v1."""
    for base, limit_name, usage_name in (
        (_cgroup_v2(root), "memory.max", "memory.current"),
        (root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit = _read(base / limit_name).strip()
        if limit.isdigit() and int(limit) < 1 << 60:
            usage = _read(base / usage_name).strip()
            used = int(usage) if usage.isdigit() else 0
            return int(limit), max(0, used - _page_cache(base))
    return None, 0


def _page_cache(base: Path) -> int:
    for line in _read(base / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("file", "total_cache"):
            return int(value)
    return 0


def _cgroup_quota(root: Path) -> float | None:
    """CPU quota in cores, or None when unlimited."""
    quota, _, period = _read(_cgroup_v2(root) / "cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit():
        return int(quota) / int(period)
    quota = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").strip()
    period = _read(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit():
        return int(quota) / int(period)
    return None


def _cgroup_v2(root: Path) -> Path:
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            own = root / "sys/fs/cgroup" / line[3:].strip().lstrip("/")
            if (own / "memory.max").exists() or (own / "cpu.max").exists():
                return own
    return root / "sys/fs/cgroup"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
