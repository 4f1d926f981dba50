"""How the processes behind a frontend are, read from their pulses: at once, asking nobody.

A process that computes for long still beats; one that is stopped does not. Knows no HTTP.
"""

from headrace.ipc.pulse import SILENT, Pulse


class Vitals:
    """`folder` is where the pulses are, "" if there are none; `limit` (s) is how long one turn may
    take, 0 for ever."""

    def __init__(self, folder: str, detokenizers: int, limit: float) -> None:
        self._limit = limit
        roles = ["scheduler", "detokenizer"] if folder else []
        roles += [f"detokenizer-{number}" for number in range(1, detokenizers)] if folder else []
        self._pulses = {role: Pulse(folder, role) for role in roles}

    def trouble(self) -> str:
        """What is wrong with one of them, or ""."""
        for role, pulse in self._pulses.items():
            reading = pulse.read()
            if reading is None:
                continue  # it is starting
            if reading.silent > SILENT:
                return f"The {role} process has not run for {reading.silent:.1f} s."
            if self._limit and reading.busy > self._limit:
                return f"The {role} process has been at one step for {reading.busy:.1f} s."
        return ""
