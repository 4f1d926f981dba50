"""What a parent and its children tell each other while they start: JSON lines on two pipes.

    parent --Boot--> child's stdin      once; the pipe stays open for as long as the parent lives
    parent --Order--> child's stdin     HTTP workers only: begin, hold, go on, end
    child --Report--> parent            what it is doing, then Ready or Failed

Plain data, checked when it is read; nothing in it can run.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from headrace.core.config import Config, Limits
from headrace.core.model_info import ModelInfo
from headrace.ipc.address import Addresses


class Boot(msgspec.Struct, frozen=True):
    """All that a child needs. `options` is `Config.revealed()` of the resolved configuration."""

    options: dict[str, Any]
    info: ModelInfo
    addresses: Addresses
    # The descriptors that HTTP workers accept from.
    listeners: list[int] = []

    @property
    def config(self) -> Config:
        return Config.from_flat(self.options)


class Serve(msgspec.Struct, frozen=True, tag=True):
    """To an HTTP worker: the model is loaded, take requests."""

    limits: Limits
    memory: dict[str, float]
    startup: dict[str, float]


class Drain(msgspec.Struct, frozen=True, tag=True):
    """To an HTTP worker: finish what runs, take nothing more, and end."""


class Fail(msgspec.Struct, frozen=True, tag=True):
    """To an HTTP worker: another process was lost; answer everything with that, and end."""

    error: str


class Suspend(msgspec.Struct, frozen=True, tag=True):
    """To an HTTP worker: a process was lost and is being started again; hold requests.

    The fields are the arguments of `TokenizerManager.suspend`; `batch` as pairs.
    """

    why: str
    scheduler: bool
    batch: list[tuple[int, int]] = []


class Resume(msgspec.Struct, frozen=True, tag=True):
    """To an HTTP worker: all processes serve again."""


Order = Serve | Drain | Fail | Suspend | Resume


class Loading(msgspec.Struct, frozen=True, tag=True):
    """The child has come to the step `what`."""

    what: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The child serves. `seconds`: how long each step of its start took."""

    seconds: dict[str, float]
    limits: Limits | None = None
    memory: dict[str, float] = {}


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The child cannot serve. `traceback` is empty when the error is meant for people."""

    error: str
    traceback: str = ""


Report = Loading | Ready | Failed

encode = msgspec.json.Encoder().encode
decode_boot = msgspec.json.Decoder(Boot).decode
decode_order: Callable[[bytes], Order] = msgspec.json.Decoder(Order).decode
decode_report = msgspec.json.Decoder(Report).decode
