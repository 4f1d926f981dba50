"""The options of a service: how it answers, what it shows, what happens when a process dies.

Parts of `core.config.Config`, declared as the others there.
"""

import dataclasses

from headrace.core.option import option
from headrace.core.parser_names import REASONING_PARSERS, TOOL_CALL_PARSERS
from headrace.core.secret import Secret


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """The HTTP side."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(30000, "Port to listen on; 0 takes a free one.", minimum=0, maximum=65535)
    api_key: Secret = option(
        Secret(), "Bearer token that clients must send; also HEADRACE_API_KEY."
    )
    admin_api_key: Secret = option(
        Secret(), "Key for the routes of operators; also HEADRACE_ADMIN_API_KEY."
    )
    api_key_file: str = option(
        "", "YAML file of named keys with weights and limits, see docs/security.md."
    )
    admin_port: int = option(
        0,
        "Serve the routes of operators on this port only; 0: on --port.",
        minimum=0,
        maximum=65535,
    )
    allow_origins: str = option(
        "local",
        "Web pages that may call: local (of this machine), * or a list of origins with commas.",
    )
    allow_hosts: str = option(
        "auto",
        "Host headers that are answered: a list with commas or *; auto is any, but names of this "
        "machine only when the server listens on loopback.",
    )
    ssl_certfile: str = option("", "PEM certificate chain: serve HTTPS.")
    ssl_keyfile: str = option("", "PEM private key of --ssl-certfile.")
    ssl_keyfile_password: Secret = option(Secret(), "Password of --ssl-keyfile.")
    ssl_ca_certs: str = option("", "PEM certificates: clients must show one of theirs.")
    enable_ssl_refresh: bool = option(False, "Take renewed certificate files without a restart.")
    max_header_bytes: int = option(
        64 << 10,
        "Largest request line and headers in bytes; each header counts 32 more.",
        minimum=1024,
    )
    tokenizer_worker_num: int = option(
        1, "Processes that serve HTTP and tokenize, all on one port.", minimum=1, maximum=64
    )
    detokenizer_worker_num: int = option(
        1, "Processes that turn token ids into text.", minimum=1, maximum=64
    )
    stream_interval: int = option(1, "Tokens per streamed chunk.", minimum=1)
    incremental_streaming_output: bool = option(
        False, "/generate streams deltas instead of the text so far."
    )
    enable_cache_report: bool = option(
        True, "Report cached_tokens in the usage of OpenAI responses."
    )
    sampling_defaults: str = option(
        "model",
        "Defaults of sampling fields that a request leaves out.",
        choices=("model", "openai"),
    )
    tool_call_parser: str = option(
        "auto",
        "How the model writes tool calls; auto asks its chat template.",
        choices=TOOL_CALL_PARSERS,
    )
    reasoning_parser: str = option(
        "auto",
        "How the model marks its reasoning; auto asks its chat template.",
        choices=REASONING_PARSERS,
    )
    preferred_sampling_params: str = option(
        "{}", "JSON object of sampling defaults laid under every request."
    )
    allow_auto_truncate: bool = option(
        False, "Cut over-long input to the context instead of refusing it."
    )
    enable_response_store: bool = option(
        False,
        "Keep responses in memory for previous_response_id, GET /v1/responses and background.",
    )
    response_store_size: int = option(1000, "Most responses kept; the oldest go first.", minimum=1)
    batch_store: str = option(
        "", "SQLite file for /v1/files and /v1/batches; empty turns them off."
    )
    batch_concurrency: int = option(8, "Most requests of batches that run at once.", minimum=1)
    strict_model_name: bool = option(False, "Answer 404 for a model name that is not served.")
    strict_fields: bool = option(
        False, "Refuse unknown fields of a request instead of naming them in a header."
    )
    skip_server_warmup: bool = option(False, "Be ready without a first generation.")
    max_request_bytes: int = option(64 << 20, "Largest request body in bytes.", minimum=1024)
    max_request_values: int = option(
        32768, "Most strings, lists and objects in a request body, together.", minimum=256
    )
    drain_timeout: int = option(
        30, "Seconds that running requests get after SIGTERM or SIGINT.", minimum=0
    )
    timeout_keep_alive: int = option(5, "Seconds an idle connection stays open.", minimum=1)


@dataclasses.dataclass(frozen=True)
class ObserveOptions:
    """Logs and metrics."""

    log_level: str = option("info", "Log level.", choices=("debug", "info", "warning", "error"))
    log_level_http: str = option(
        "warning", "Log level of the HTTP server.", choices=("debug", "info", "warning", "error")
    )
    enable_metrics: bool = option(True, "Serve Prometheus metrics at /metrics.")
    metrics_compat: str = option(
        "none",
        "Serve metrics also under the names of another server, for dashboards and routers.",
        choices=("none", "sglang", "vllm"),
    )
    log_requests: bool = option(False, "Log every request when it comes and when it ends.")
    log_requests_level: int = option(
        2,
        "0: ids and counts; 1: sampling parameters too; 2: the first 2048 characters of input and "
        "output too; 3: all of them.",
        minimum=0,
        maximum=3,
    )
    log_requests_format: str = option(
        "text", "How a logged request is written.", choices=("text", "json")
    )
    profile_dir: str = option(
        "", "Folder for the traces of /start_profile; empty turns profiles off."
    )
    record_schedule: str = option(
        "", "New file that gets everything the scheduler hears (prompts too), for headrace replay."
    )
    record_limit_mb: int = option(256, "Most MiB of --record-schedule.", minimum=1)
    decode_log_interval: int = option(40, "Steps between decode log lines.", minimum=1)
    log_cache_divergence: int = option(
        0,
        "Log where a prompt parts from a cached one with which it shares at least so many tokens; "
        "0 does not.",
        minimum=0,
    )
    enable_request_time_stats_logging: bool = option(
        False, "Log for every request how long it was where."
    )
    enable_trace: bool = option(
        False, "Send a trace of every request over OTLP (needs the extra otel)."
    )
    otlp_traces_endpoint: str = option(
        "localhost:4317", "Where traces go: host:port for gRPC, a URL with a path for HTTP."
    )
    otlp_service_name: str = option("headrace", "Name of this service in traces.")


@dataclasses.dataclass(frozen=True)
class RecoverOptions:
    """What happens when a process dies or is stuck; see docs/recovery.md."""

    on_crash: str = option(
        "restart",
        "restart starts a lost process again and its requests go on; exit ends the server.",
        choices=("restart", "exit"),
    )
    restart_limit: int = option(
        10, "Most restarts within the window; one more ends the server.", minimum=1
    )
    restart_window: int = option(300, "Seconds over which restarts are counted.", minimum=1)
    standby: bool = option(
        False,
        "Keep a second scheduler process that has everything but the weights, to replace a lost "
        "one sooner.",
    )
    watchdog_timeout: float = option(
        300.0,
        "Seconds after which a process that is stuck in one step, or does not run at all, is "
        "killed; 0 waits for ever.",
        minimum=0.0,
    )
    crash_dump_folder: str = option(
        "", "Folder for reports of crashes: stacks and last output, no prompts. Empty keeps none."
    )
