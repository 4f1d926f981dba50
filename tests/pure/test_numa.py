"""--numa-node: which cores a node has, and a process that is bound to them."""

import os
import subprocess
import sys

import pytest

from headrace.core.errors import BadRequest
from headrace.core.hardware import node_cores
from headrace.engine.parts import usable


def test_the_cores_of_a_node(tmp_path):
    for node, text in ((0, "0-2,8\n"), (1, "3\n"), (2, "\n")):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(text)
    found = [node_cores(node, tmp_path) for node in range(4)]
    assert found == [{0, 1, 2, 8}, {3}, set(), set()]


def test_a_node_that_is_not_there_is_refused():
    with pytest.raises(BadRequest, match="--numa-node 63"):
        usable(63)
    assert usable(None).cores >= 1


def test_a_process_is_bound_with_its_threads():
    cores = node_cores(0) & os.sched_getaffinity(0)
    if not cores:  # a kernel without NUMA
        with pytest.raises(BadRequest):
            usable(0)
        return
    assert usable(0).cores <= len(cores)
    code = (
        "import os, threading\n"
        "from headrace.engine.numa import bind\n"
        "bind(0)\n"
        "made = threading.Thread(target=lambda: print(sorted(os.sched_getaffinity(0))))\n"
        "made.start(); made.join()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str(sorted(cores)), result.stderr
