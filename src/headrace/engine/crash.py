"""What is written when a process dies: stacks, its last output, how busy it was. No prompts.

    <folder>/headrace-crash-<time>-<role>-<pid>.txt

Python stacks come from `faulthandler` inside the process, native ones from py-spy or gdb where they
are installed, else /proc tells what each thread waits for. A folder that cannot be written costs a
line in the log and nothing else.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from headrace.engine.child import Child
from headrace.ipc.pulse import Pulse

logger = logging.getLogger(__name__)

# A child writes the Python stack of the thread that gets the first, its main thread; and those of
# all threads when it gets the second. Frames of a thread that runs meanwhile may be read while they
# change, which ends the process at times: so what is certain comes first.
OWN_STACK, ALL_STACKS = signal.SIGUSR2, signal.SIGRTMIN + 2
_BETWEEN_SECONDS = 0.1
_TOOL_SECONDS = 15.0
_PREFIX = "headrace-crash-"
_KEEP = 50


def ask_for_stacks(child: Child) -> None:
    """Let a stuck child show its stacks; they come with its output."""
    native = native_stacks(child.process.pid)
    child.show(native.encode() + b"\n")
    with contextlib.suppress(ProcessLookupError):
        # The kernel gives a signal to the main thread, unless the process is stopped.
        os.kill(child.process.pid, signal.SIGCONT)
        os.kill(child.process.pid, OWN_STACK)
        time.sleep(_BETWEEN_SECONDS)
        os.kill(child.process.pid, ALL_STACKS)


def native_stacks(pid: int) -> str:
    """The stacks of a process as an installed tool sees them, else what its threads wait for."""
    gdb = ["gdb", "-p", str(pid), "-batch", "-nx", "-ex", "set pagination off"]
    tools = (
        ["py-spy", "dump", "--native", "--pid", str(pid)],
        [*gdb, "-ex", "thread apply all backtrace 40"],
    )
    for command in tools:
        if shutil.which(command[0]) is None:
            continue
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, timeout=_TOOL_SECONDS, check=False)
            if done.returncode == 0:
                return done.stdout.decode("utf-8", "replace")
    return "\n".join(_threads(pid))


def write_report(folder: str, child: Child, why: str, pulse: Pulse) -> Path | None:
    """Describe a dead child in a file of `folder`, if there is one; returns the file."""
    if not folder:
        return None
    reading = pulse.read()
    lines = [
        why,
        f"time: {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
        f"process: {child.role}, pid {child.process.pid}, {time.monotonic() - child.started:.1f} s",
        f"pulse: {reading}",
        f"requests in its batch: {len(pulse.last_batch())}",
        "last output:",
        *child.last_lines,
    ]
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{child.role}-{child.process.pid}"
    path = Path(folder, f"{_PREFIX}{name}.txt")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in sorted(path.parent.glob(f"{_PREFIX}*.txt"))[: -_KEEP + 1]:
            old.unlink()
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    except OSError as error:
        logger.error("the report of the crash cannot be written: %s", error)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    logger.error("a report of the crash is %s", path)
    return path


def _threads(pid: int) -> list[str]:
    """Name, state and kernel function of each thread."""
    found = ["threads (install py-spy or gdb for native stacks):"]
    with contextlib.suppress(OSError):
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            name, waits = (task / "comm").read_text().strip(), (task / "wchan").read_text()
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            found.append(f"  {task.name} {name}: state {state}, in {waits or 'user code'}")
    return found
