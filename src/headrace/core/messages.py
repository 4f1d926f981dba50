"""Every message that crosses a process border, as msgspec Structs.

Tokenizer manager -> scheduler: `Inbound`. Scheduler -> detokenizer -> tokenizer manager:
`Outbound`. Structs are positional (`array_like`): add fields only at the end, with defaults.
Token ids travel as int32 little-endian bytes, which costs a microsecond for any length.
Knows nothing of sockets, HTTP or devices.
"""

from typing import Any, Literal

import msgspec
import numpy as np

from headrace.core.timeline import Timeline


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, omit_defaults=True):
    """Base of all messages; the class name is the tag on the wire."""


def pack_ids(ids: "list[int] | np.ndarray") -> bytes:
    """Token ids -> int32 little-endian bytes."""
    return np.asarray(ids, dtype="<i4").tobytes()


def unpack_ids(data: bytes) -> np.ndarray:
    """Inverse of `pack_ids`; a read-only int32 view, shape [n]."""
    return np.frombuffer(data, dtype="<i4")


GRAMMAR_FIELDS = ("json_schema", "regex", "ebnf", "structural_tag")


class SamplingParams(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """How to choose tokens and when to stop; the fields of sampling_params on the wire.

    `max_new_tokens=None` means until the context ends. `top_k=-1` means all. A temperature below
    1e-6 is greedy. `seed` keys the sampling noise together with the sample index and position.
    `GRAMMAR_FIELDS` constrain the output; at most one of them, see docs/structured-output.md.
    `custom_logit_processor` names a plug-in, which gets `custom_params`.
    """

    max_new_tokens: int | None = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[int, float] = {}
    n: int = 1
    seed: int | None = None
    stream_interval: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    custom_logit_processor: str | None = None
    custom_params: dict[str, Any] = {}

    @property
    def grammars(self) -> list[tuple[str, str]]:
        """(field, text) of each grammar that is asked for; a valid request has at most one."""
        found = ((name, getattr(self, name)) for name in GRAMMAR_FIELDS)
        return [(name, text) for name, text in found if text is not None]

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6 or self.top_k == 1

    @property
    def penalized(self) -> bool:
        return (
            self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or self.repetition_penalty != 1.0
        )


class LogprobSpec(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Which log-probabilities to return.

    `start`: first prompt position reported (-1: output only). `top`: alternatives per position.
    `ids`: token ids whose log-probability is reported at every position.
    """

    start: int = -1
    top: int = 0
    ids: tuple[int, ...] = ()


class SessionParams(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Where in a session a request goes on: after the request `rid`, or anew without one.

    `offset` keeps that many tokens of what came before (negative: all but so many; 0: all).
    `replace` drops what followed `rid`; `drop_previous_output` leaves out the output of `rid`.
    `fill`: the output may fill the context (set by the tokenizer manager, which does not know how
    much came before).
    """

    id: str
    rid: str = ""
    offset: int = 0
    replace: bool = False
    drop_previous_output: bool = False
    fill: bool = False


class PoolSpec(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """A request for one vector of its prompt instead of text.

    `second`: where the second text of a pair begins, 0 if there is none. The tokenizer manager
    fills in what the model allows: `reuse` cached prefixes, be computed in `pieces`; and shortens
    a prompt that does not fit if it may be `cut`.
    """

    second: int = 0
    reuse: bool = True
    pieces: bool = True
    cut: bool = False


class GenerateRequest(Message, frozen=True, array_like=True):
    """One sequence to generate: the only form of a request between HTTP adapter and scheduler.

    An adapter fills `text` or `ids`; the tokenizer manager fills `ids`, the seed and `group`.
    Requests of one `group` are samples 0..n-1 of the same prompt; the first one computes it.
    `namespace` separates prefix caches (extra_key, cache_salt). With `reasoning_end` ("</think>")
    a grammar constrains what follows that text, which must come; before it everything is allowed.
    `origin` is the frontend that gets the answer, here and in the other messages.
    With `pool` the answer is `Delta.pooled`, and `max_new_tokens` must be 0. `tenant` is the owner
    of the API key, with `weight` when tenants compete. `within` and `first_token_within`: seconds
    from arrival after which nobody waits for the answer, its first token (0: for ever).
    A request that goes on after a crash brings the output its client has (`out`, int32 bytes) and
    the number of this `attempt`, which its deltas repeat; `strikes` counts the crashes that it may
    have caused. With `timings` the last delta has a timeline.
    """

    rid: str
    ids: bytes = b""
    text: str | None = None
    sampling: SamplingParams = SamplingParams()
    stream: bool = False
    logprobs: LogprobSpec | None = None
    priority: int | None = None
    namespace: str = ""
    group: str = ""
    sample_index: int = 0
    received: float = 0.0
    reasoning_end: str = ""
    session: SessionParams | None = None
    origin: int = 0
    pool: PoolSpec | None = None
    tenant: str = ""
    weight: float = 1.0
    within: float = 0.0
    first_token_within: float = 0.0
    out: bytes = b""
    attempt: int = 0
    strikes: int = 0
    timings: bool = False


class AbortRequest(Message, frozen=True, array_like=True):
    """End requests: the exact `rid`, every rid that starts with it if `prefix`, or all."""

    rid: str = ""
    prefix: bool = False
    all: bool = False
    message: str = "Aborted by the client."
    # Only requests of this frontend; -1: whoever sent them.
    origin: int = -1
    # Only requests of this tenant; "": of all.
    tenant: str = ""


Verb = Literal[
    "ping",
    "flush_cache",
    "loads",
    "state",
    "watch",
    "weights",
    "pause",
    "continue",
    "open_session",
    "close_session",
    "start_profile",
    "stop_profile",
    "slow_down",
    "log_level",
    "freeze_gc",
    "drain",
]


class Control(Message, frozen=True, array_like=True):
    """A verb for the scheduler that is answered by one `ControlReply` with the same id.

    "watch" asks for what a dashboard shows, with the steps after number `since`.
    """

    id: int
    verb: Verb
    args: dict[str, Any] = {}
    origin: int = 0


class ControlReply(Message, frozen=True, array_like=True):
    id: int
    ok: bool = True
    message: str = ""
    data: dict[str, Any] = {}
    origin: int = 0


class FinishReason(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Why a request ended. `matched` is the stop token id or stop string. `retry_after`: seconds
    after which asking again may help, 0 if that is not known."""

    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    length: int = 0
    message: str = ""
    status: int = 0
    kind: str = ""
    retry_after: float = 0.0

    def to_wire(self) -> dict[str, Any]:
        """The `finish_reason` object of SGLang's meta_info."""
        if self.type == "length":
            return {"type": "length", "length": self.length}
        if self.type == "stop":
            return (
                {"type": "stop"}
                if self.matched is None
                else {
                    "type": "stop",
                    "matched": self.matched,
                }
            )
        return {
            "type": "abort",
            "message": self.message,
            "status_code": self.status,
            "err_type": self.kind,
        }


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Log-probabilities at consecutive positions, parallel lists.

    `tokens[i]` was at the position and had `values[i]` (None: nothing precedes it). `top[i]` and
    `ids[i]` are (token id, logprob) pairs, or the lists are empty when not asked for.
    """

    tokens: list[int] = []
    values: list[float | None] = []
    top: list[list[tuple[int, float]] | None] = []
    ids: list[list[tuple[int, float]] | None] = []


class StreamStart(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """What the detokenizer must know of a request, sent with its first delta.

    `out` is output that comes before the delta's (after a crash); its text comes with it.
    """

    prompt_tail: bytes
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    out: bytes = b""


class Delta(Message, frozen=True, array_like=True):
    """News of one request: new token ids (scheduler) and their text (detokenizer).

    Counters are totals so far. `input_logprobs` comes once, with the first delta. `pooled`: fp32
    little-endian bytes, the answer to a request with `pool`. `timeline` comes with the finish.
    """

    rid: str
    ids: list[int] = []
    text: str = ""
    finish: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    logprobs: TokenLogprobs | None = None
    input_logprobs: TokenLogprobs | None = None
    start: StreamStart | None = None
    queue_time: float = 0.0
    first_token_time: float = 0.0
    origin: int = 0
    pooled: bytes = b""
    attempt: int = 0
    timeline: Timeline | None = None


class SchedulerStats(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Counters (…_total) and gauges of one scheduler, cheap enough to send often.

    `..._counts` are those of a histogram with the bounds of metrics/record. `retry_after`: seconds
    until half of the queue is gone, at the pace of late.
    """

    running: int = 0
    waiting: int = 0
    used_tokens: int = 0
    evictable_tokens: int = 0
    max_total_tokens: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    requests_total: int = 0
    aborted_total: int = 0
    retracted_total: int = 0
    evicted_tokens_total: int = 0
    steps_total: int = 0
    gen_throughput: float = 0.0
    new_token_ratio: float = 0.0
    uptime: float = 0.0
    max_running_requests: int = 0
    paused: int = 0
    grammar_waiting: int = 0
    grammar_requests_total: int = 0
    grammar_cache_hits_total: int = 0
    grammar_cache_misses_total: int = 0
    grammar_cache_evictions_total: int = 0
    grammar_aborted_total: int = 0
    grammar_timeouts_total: int = 0
    grammar_late_masks_total: int = 0
    grammar_compile_counts: list[int] = []
    grammar_compile_seconds_total: float = 0.0
    grammar_mask_counts: list[int] = []
    grammar_mask_seconds_total: float = 0.0
    draining: int = 0
    retry_after: float = 0.0
    is_paused: bool = False
    failed_steps_total: int = 0


class Deltas(Message, frozen=True, array_like=True):
    """Everything one scheduler step has to say."""

    items: list[Delta] = []
    stats: SchedulerStats | None = None


class PeerAsk(Message, frozen=True, array_like=True):
    """A frontend asks another one for its metrics, or tells it how to log (`logging`)."""

    origin: int
    id: int = 0
    logging: dict[str, Any] | None = None


class PeerMetrics(Message, frozen=True, array_like=True):
    """The answer: values and histograms by name."""

    origin: int
    id: int
    values: dict[str, Any] = {}


Inbound = GenerateRequest | AbortRequest | Control
Outbound = Deltas | ControlReply
# What a frontend may hear.
News = Deltas | ControlReply | PeerAsk | PeerMetrics
