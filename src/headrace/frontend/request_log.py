"""The log of requests: one line when a request is sent to the scheduler, one when it ends.

Off unless --log-requests (or /configure_logging) says so. The level says how much of a request is
shown: its text from level 2 on. Invariant: off, it holds nothing and costs a comparison.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from headrace.core.messages import Delta, GenerateRequest, SamplingParams, unpack_ids
from headrace.core.serve_options import ObserveOptions

logger = logging.getLogger("headrace.requests")

LEVELS = (0, 1, 2, 3)
FORMATS = ("text", "json")
_SHOWN = 2048
_DEFAULTS = SamplingParams()


class _Open:
    """What is kept of a request until its end."""

    def __init__(self, now: float) -> None:
        self.since = now
        self.text = ""


class RequestLog:
    """Belongs to one loop. `level` and `form` may be changed at any time."""

    def __init__(self, on: bool, level: int, form: str) -> None:
        self.level = level
        self.form = form
        self._on = on
        self._open: dict[str, _Open] = {}

    @classmethod
    def create(cls, options: ObserveOptions) -> "RequestLog":
        """As the options of the server say."""
        return cls(options.log_requests, options.log_requests_level, options.log_requests_format)

    @property
    def on(self) -> bool:
        return self._on

    @on.setter
    def on(self, value: bool) -> None:
        self._on = value
        if not value:
            self._open.clear()

    def configure(
        self,
        log_requests: bool | None = None,
        log_requests_level: int | None = None,
        log_requests_format: str | None = None,
        log_level: str | None = None,
    ) -> None:
        """Change what is given; `log_level` is that of the whole process."""
        if log_level is not None:
            logging.getLogger().setLevel(log_level.upper())
        if log_requests_level is not None:
            self.level = log_requests_level
        if log_requests_format is not None:
            self.form = log_requests_format
        if log_requests is not None:
            self.on = log_requests

    def received(
        self, asked: Sequence[GenerateRequest], prepared: Sequence[GenerateRequest]
    ) -> None:
        """Requests are about to be sent; `asked` has their texts, `prepared` their token ids."""
        for before, request in zip(asked, prepared, strict=True):
            self._open[request.rid] = _Open(time.monotonic())
            entry: dict[str, Any] = {"prompt_tokens": len(request.ids) // 4}
            if self.level >= 1:
                entry["sampling_params"] = changed(request.sampling)
            if self.level >= 2 and before.text is not None:
                entry["text"] = self._cut(before.text)
            elif self.level >= 2:
                entry["input_ids"] = self._cut(unpack_ids(request.ids).tolist())
            self._write("received", request.rid, entry)

    def add(self, delta: Delta) -> None:
        """News of a request; its end is logged."""
        found = self._open.get(delta.rid)
        if found is None:
            return  # it was sent before the log was turned on
        if self.level >= 2 and (self.level >= 3 or len(found.text) <= _SHOWN):
            found.text += delta.text
        if delta.finish is None:
            return
        del self._open[delta.rid]
        entry: dict[str, Any] = {
            "finish_reason": delta.finish.to_wire(),
            "prompt_tokens": delta.prompt_tokens,
            "cached_tokens": delta.cached_tokens,
            "completion_tokens": delta.completion_tokens,
            "e2e_latency": round(time.monotonic() - found.since, 6),
        }
        if delta.timeline is not None:
            entry["timings"] = delta.timeline.seconds()
        if self.level >= 2:
            entry["text"] = self._cut(found.text)
        self._write("finished", delta.rid, entry)

    def _cut(self, value: Any) -> Any:
        return value if self.level >= 3 else value[:_SHOWN]

    def _write(self, event: str, rid: str, entry: Mapping[str, Any]) -> None:
        if self.form == "json":
            logger.info(msgspec.json.encode({"event": event, "rid": rid, **entry}).decode())
        else:
            shown = ", ".join(f"{name}={value!r}" for name, value in entry.items())
            logger.info("request %s: rid=%r, %s", event, rid, shown)


def changed(sampling: SamplingParams) -> dict[str, Any]:
    """The fields that differ from the protocol's defaults."""
    return {
        name: value
        for name in sampling.__struct_fields__
        if (value := getattr(sampling, name)) != getattr(_DEFAULTS, name)
    }
