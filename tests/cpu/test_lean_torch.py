"""torch as the scheduler process imports it."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import headrace.engine.lean_torch, headrace.runner.worker, headrace.engine.build
import torch
assert "torch._decomp" not in sys.modules
assert not hasattr(torch, "_meta_registrations")
import torch._meta_registrations
assert torch._meta_registrations.__file__
assert "torch._decomp" in sys.modules
double = torch.compile(lambda x: x * 2, backend="eager")
assert double(torch.ones(2)).tolist() == [2.0, 2.0]
assert torch.linalg.qr(torch.empty(3, 2, device="meta"))[0].shape == (3, 2)
"""


@pytest.mark.slow
def test_what_tracing_needs_comes_later():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
