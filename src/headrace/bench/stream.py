"""Reads the bytes of one streamed answer into times and token counts.

The reader shares its cores with the server under test, so a read costs a few byte searches; JSON is
parsed only at the end of a stream. Tokens are counted by the server (`completion_tokens`), never by
chunks: a chunk is what arrives at once, and its gap to the one before is shared by all its tokens.
Knows no sockets and no clock: times are given. Formats: SGLang's /generate (text so far, or deltas)
and OpenAI's completion and chat chunks.
"""

import dataclasses
import itertools
import re
from collections import deque
from typing import Any

import msgspec

_COUNT = b'"completion_tokens":'
_DIGITS = re.compile(rb"\s*(\d+)")
# A quote inside a JSON string is escaped, so this finds only keys with a value that is not empty.
_OUTPUT = re.compile(
    rb'"(?:text|content|reasoning_content|reasoning)":\s*"[^"]|"tool_calls":\s*\[\s*\{'
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What one request did. Times in seconds; `start` on the clock of `time.perf_counter`."""

    ok: bool
    start: float
    error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    ttft: float = 0.0
    e2e: float = 0.0
    tpot: float | None = None
    """Mean time per token after the first chunk; None when nothing came after it."""
    itl: list[float] = dataclasses.field(default_factory=list)
    """Gap before each token after the first chunk; tokens of one chunk share its gap."""
    gaps: list[float] = dataclasses.field(default_factory=list)
    """Gap before each chunk after the first."""
    chunks: int = 0
    counted: bool = True
    """False when the server sent no usage, so that chunks had to be counted as tokens."""
    text: str = ""


class StreamMeter:
    """Fed with the reads of one answer, gives its `Sample`."""

    def __init__(self, native: bool, keep_text: bool = False) -> None:
        """`native`: SGLang's /generate, else OpenAI chunks. `keep_text`: also collect the text."""
        self._native = native
        self._keep_text = keep_text
        self._rest = b""
        self._count = 0
        self._times: list[float] = []
        self._weights: list[int] = []
        self._tail: deque[bytes] = deque(maxlen=4)
        self._kept: list[bytes] = []
        self._cumulative: bool | None = None
        self._done = False
        self._error = ""

    def feed(self, now: float, data: bytes) -> None:
        """Take what one read returned at time `now`."""
        if b"\r" in data:
            data = data.replace(b"\r", b"")
        *events, self._rest = (self._rest + data).split(b"\n\n")
        tokens = 0
        for event in events:
            payload = _payload(event)
            if payload == b"[DONE]":
                self._done = True
            elif payload:
                tokens += self._take(payload)
        if tokens:
            self._times.append(now)
            self._weights.append(tokens)

    def _take(self, payload: bytes) -> int:
        """New tokens in an event; 1 for output of an OpenAI chunk that carries no count."""
        self._tail.append(payload)
        if self._keep_text:
            self._keep(payload)
        tokens = self._new_tokens(payload)
        if not tokens and b'"error"' in payload[:40]:
            self._error = error_message(payload)
        return tokens

    def _new_tokens(self, payload: bytes) -> int:
        if not self._native and not _OUTPUT.search(payload):
            return 0
        count = _number_after(payload, _COUNT)
        if count is None:
            return 0 if self._native else 1
        new = count - self._count
        self._count = count
        return new

    def _keep(self, payload: bytes) -> None:
        """Keep events for the text: all deltas, or only the last of a cumulative stream."""
        if self._native and self._cumulative is None and self._count:
            event = _decode(payload)
            ids = event.get("output_ids")
            count = (event.get("meta_info") or {}).get("completion_tokens")
            self._cumulative = ids is None or len(ids) == count
        if self._cumulative:
            self._kept.clear()
        self._kept.append(payload)

    def finish(self, start: float, now: float) -> Sample:
        """The sample of a request sent at `start` whose answer ended at `now`."""
        if self._rest.startswith(b"data:"):  # a last event without its blank line
            self.feed(now, b"\n\n")
        usage, reason = self._ending()
        error = self._error or self._problem(reason)
        if error:
            return Sample(ok=False, start=start, error=error, e2e=now - start)
        chunk_tokens = sum(self._weights)
        output_tokens = usage.get("completion_tokens") or chunk_tokens
        # Above 1 when an OpenAI chunk holds several tokens: they are spread evenly over the chunks.
        per_weight = max(1.0, output_tokens / chunk_tokens) if chunk_tokens else 1.0
        gaps = [b - a for a, b in itertools.pairwise(self._times)]
        itl: list[float] = []
        for gap, weight in zip(gaps, self._weights[1:], strict=True):
            itl.extend([gap / (weight * per_weight)] * weight)
        later_tokens = (chunk_tokens - self._weights[0]) * per_weight if self._weights else 0
        first = self._times[0] if self._times else now
        return Sample(
            ok=True,
            start=start,
            prompt_tokens=usage.get("prompt_tokens") or 0,
            output_tokens=output_tokens,
            cached_tokens=_cached_tokens(usage),
            ttft=first - start,
            e2e=now - start,
            tpot=sum(gaps) / later_tokens if later_tokens else None,
            itl=itl,
            gaps=gaps,
            chunks=len(self._times),
            counted="completion_tokens" in usage,
            text="".join(_text(payload) for payload in self._kept),
        )

    def _ending(self) -> tuple[dict[str, Any], Any]:
        """(usage, finish reason) from the last events; each comes in an event of its own."""
        usage: dict[str, Any] = {}
        reason: Any = None
        for payload in self._tail:
            event = _decode(payload)
            if self._native:
                usage = event.get("meta_info") or {}
                reason = usage.get("finish_reason")
            else:
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    reason = choice.get("finish_reason") or reason
        return usage, reason

    def _problem(self, reason: Any) -> str:
        """Why the answer does not count, or nothing."""
        if not self._tail:
            return f"the answer holds no server-sent events: {_excerpt(self._rest) or 'empty body'}"
        if reason is None or not self._done:
            return "the stream ended before the answer did"
        detail = reason if isinstance(reason, dict) else {"type": reason}
        if detail.get("type") == "abort":
            return f"aborted: {detail.get('message') or 'the server gave no reason'}"
        return ""


def error_message(body: bytes) -> str:
    """The sentence in an error body of any of the usual shapes, else its beginning."""
    event = _decode(body)
    error = event.get("error", event)
    if isinstance(error, str):
        return error
    for key in ("message", "detail"):
        if isinstance(error, dict) and error.get(key):
            return str(error[key])
    return _excerpt(body)


def _payload(event: bytes) -> bytes:
    """What follows `data:` in an event; empty for comments and pings."""
    if event.startswith(b"data:"):
        return event[5:].strip()
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            return line[5:].strip()
    return b""


def _number_after(payload: bytes, key: bytes) -> int | None:
    """The number behind the last `key`; searched from the end, where the counts are."""
    at = payload.rfind(key)
    found = _DIGITS.match(payload, at + len(key)) if at >= 0 else None
    return int(found[1]) if found else None


def _cached_tokens(usage: dict[str, Any]) -> int:
    details = usage.get("prompt_tokens_details") or usage
    return details.get("cached_tokens") or 0


def _text(payload: bytes) -> str:
    """Output of one event: `text`, or reasoning and content of a chat delta."""
    event = _decode(payload)
    if "choices" not in event:
        return event.get("text") or ""
    parts = []
    for choice in event["choices"]:
        delta = choice.get("delta") or {}
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        parts += [reasoning, delta.get("content"), choice.get("text")]
    return "".join(part for part in parts if part)


def _decode(payload: bytes) -> dict[str, Any]:
    """A JSON object; empty for anything else, since the other end may be any server."""
    try:
        value = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _excerpt(body: bytes, limit: int = 300) -> str:
    return body[:limit].decode(errors="replace").strip()
