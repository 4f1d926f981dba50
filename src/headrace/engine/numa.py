"""Binds this process to one NUMA node: its cores, and memory from there first.

To be called before threads and large memory are made, which inherit it. Preferred, not forced: a
node that is full lends from the others rather than ending the process.
"""

import ctypes
import logging
import os
import platform

from headrace.core.hardware import node_cores

logger = logging.getLogger(__name__)

# set_mempolicy(2) by machine; there is no function for it in the C library.
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MPOL_PREFERRED = 1


def bind(node: int) -> None:
    """Run on the cores of `node` that this process may use, with memory from there.

    The node has been checked (`core.hardware.node_cores`). A kernel that refuses (as in some
    containers) is told of in the log; the process then runs as before.
    """
    cores = node_cores(node) & os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    number = _SET_MEMPOLICY.get(platform.machine())
    mask = ctypes.c_ulong(1 << node)
    library = ctypes.CDLL(None, use_errno=True)
    bits = ctypes.c_ulong(8 * ctypes.sizeof(mask) + 1)
    if number is None or library.syscall(number, _MPOL_PREFERRED, ctypes.byref(mask), bits) != 0:
        why = os.strerror(ctypes.get_errno()) if number else platform.machine()
        logger.warning("NUMA node %d: memory may come from other nodes (%s)", node, why)
    logger.info("bound to NUMA node %d: %d cores", node, len(cores))
