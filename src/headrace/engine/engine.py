"""The server without HTTP: the same processes and results, called from Python.

The manager lives on an event loop in a thread of its own, so that the Engine works from scripts,
threads and inside a running loop, and installs no signal handlers. Arguments and results are
SGLang's; the dicts are those of /generate.
"""

import atexit
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from headrace import __version__
from headrace.core.config import Config
from headrace.engine import vectors
from headrace.engine.facts import model_facts
from headrace.engine.launch import launch
from headrace.engine.loop_thread import LoopThread
from headrace.frontend import control
from headrace.frontend.native import GenerateCall, NativeResult, parse_generate
from headrace.frontend.sampling import native_defaults
from headrace.frontend.validate import error_of
from headrace.frontend.weights import saved

Result = dict[str, Any]


class Engine:
    """A model served in this process tree.

        with Engine(model_path="...") as engine:
            print(engine.generate("Hello", {"max_new_tokens": 8})["text"])

    Takes every server option as a keyword, and the log level "error" unless told otherwise.

    Raises:
        LoadError: the model cannot be loaded. BadRequest: a wrong option.
    """

    def __init__(self, **server_args: Any) -> None:
        self._owner = os.getpid()
        self._closed = False
        self._launched = launch(Config.from_flat({"log_level": "error", **server_args}))
        self._config = self._launched.config
        self._manager = self._launched.manager
        self._thread = LoopThread()
        atexit.register(self.shutdown)
        try:
            self._defaults = native_defaults(self._config.serve)
            self._thread.run(self._manager.start())
            self._launched.watch.begin("wait for children")
            reports = self._launched.wait_ready()
            self._thread.run(self._launched.open(reports))
            self._launched.watch.begin("")
            self._manager.startup = self._launched.watch.seconds
            self._manager.ready.set()
        except BaseException:
            self.shutdown()
            raise

    # -- generation ---------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """A dict {"text", "output_ids", "meta_info"}, or a list of them for a batch or n > 1.

        With `stream=True` an iterator of dicts, each with the text so far (and the `index` of its
        prompt in a batch); closing it aborts. `fields` are the other fields of /generate:
        return_logprob, logprob_start_len, top_logprobs_num, token_ids_logprob, stream, rid,
        priority, extra_key, cache_salt, session_params, custom_logit_processor,
        return_text_in_logprobs, return_prompt_token_ids, return_timings.

        Raises:
            HeadraceError: the request is wrong, or the engine could not answer it.
        """
        call = self._parse(prompt, sampling_params, input_ids, fields)
        if call.stream:
            return self._thread.iterate(self._results(call))
        return self._thread.run(self._collect(call))

    async def async_generate(
        self,
        prompt: str | list[str] | None = None,
        sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """`generate` for any running loop; with `stream=True` gives an async iterator."""
        call = self._parse(prompt, sampling_params, input_ids, fields)
        if call.stream:
            return self._thread.aiterate(self._results(call))
        return await self._thread.arun(self._collect(call))

    def _parse(
        self, prompt: Any, sampling_params: Any, input_ids: Any, fields: dict[str, Any]
    ) -> GenerateCall:
        body = {"text": prompt, "input_ids": input_ids, "sampling_params": sampling_params}
        return parse_generate(body | fields, self._defaults)

    async def _results(self, call: GenerateCall) -> AsyncGenerator[Result, None]:
        """The results as they grow; in a batch with the index."""
        requests = call.requests
        if call.prompt_token_ids:
            requests = await self._manager.with_ids(requests)
        tokenizer = self._manager.tokenizer if call.text_in_logprobs else None
        results = [
            NativeResult(
                request,
                token_text=tokenizer.token_text if tokenizer else None,
                prompt_token_ids=call.prompt_token_ids,
                incremental=call.stream and self._config.serve.incremental_streaming_output,
            )
            for request in requests
        ]
        async with aclosing(self._manager.generate_many(requests)) as news:
            async for index, delta in news:
                if delta.finish is not None and (error := error_of(delta.finish)) is not None:
                    raise error
                results[index].add(delta)
                result = results[index].to_dict()
                yield {"index": index, **result} if call.as_list else result

    async def _collect(self, call: GenerateCall) -> Any:
        found: dict[int, Result] = {}
        async with aclosing(self._results(call)) as results:
            async for result in results:
                found[result.pop("index", 0)] = result
        return [found[i] for i in range(len(call.requests))] if call.as_list else found[0]

    # -- vectors and scores -------------------------------------------------------------------

    def encode(
        self,
        prompt: str | list[str] | list[list[str]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """{"embedding", "meta_info"}, or a list of them. `fields`: rid, priority, dimensions.

        The embedding of a classifier is its logits. Pairs of texts are for cross-encoders, whose
        score of a pair is that of sentence-transformers' CrossEncoder.

        Raises:
            HeadraceError: the request is wrong, or the model generates text.
        """
        body = {"text": prompt, "input_ids": input_ids} | fields
        return self._thread.run(vectors.encode(self._manager, body))

    async def async_encode(
        self,
        prompt: str | list[str] | list[list[str]] | None = None,
        input_ids: list[int] | list[list[int]] | None = None,
        **fields: Any,
    ) -> Any:
        """`encode` for any running loop."""
        body = {"text": prompt, "input_ids": input_ids} | fields
        return await self._thread.arun(vectors.encode(self._manager, body))

    def rerank(self, prompt: list[list[str]]) -> Any:
        """The scores of [query, document] pairs by a cross-encoder, in the form of `encode`."""
        return self.encode(prompt)

    def score(
        self,
        query: str | list[int],
        items: str | list[str] | list[list[int]],
        label_token_ids: list[int] | None = None,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """The `scores` of /v1/score.

        Raises:
            HeadraceError: the request is wrong, or the model cannot answer it.
        """
        question = vectors.question(query, items, label_token_ids, apply_softmax, item_first)
        return self._thread.run(vectors.score(self._manager, question))

    async def async_score(
        self,
        query: str | list[int],
        items: str | list[str] | list[list[int]],
        label_token_ids: list[int] | None = None,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """`score` for any running loop."""
        question = vectors.question(query, items, label_token_ids, apply_softmax, item_first)
        return await self._thread.arun(vectors.score(self._manager, question))

    # -- the rest -----------------------------------------------------------------------------

    def flush_cache(self) -> bool:
        """Forget all cached prefixes; False while requests run."""
        return self._thread.run(self._manager.control("flush_cache")).ok

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End every request whose rid starts with `rid`, or all."""
        self._thread.run(self._abort(rid, abort_all))

    async def _abort(self, rid: str, abort_all: bool) -> None:
        if rid or abort_all:
            self._manager.abort(rid, prefix=True, all=abort_all)

    def pause_generation(self, mode: str = "abort") -> None:
        """Let nobody run; what comes waits. When it returns no step is in flight.

        `abort` ends all requests, `retract` frees their pages and lets them wait, `in_place`
        freezes them.
        """
        self._thread.run(control.pause(self._manager, mode))

    def continue_generation(self) -> None:
        """The end of a pause."""
        self._thread.run(control.go_on(self._manager))

    def open_session(
        self,
        capacity_of_str_len: int = 0,
        session_id: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """A new session; returns its id, for the `session_params` of `generate`."""
        return self._thread.run(
            control.open_session(self._manager, capacity_of_str_len, session_id, timeout)
        )

    def close_session(self, session_id: str) -> None:
        """Forget a session."""
        self._thread.run(control.close_session(self._manager, session_id))

    def start_profile(
        self, name: str = "", start_step: int | None = None, num_steps: int | None = None
    ) -> str:
        """Record the scheduler's steps; returns the file in `profile_dir` it will be."""
        started = control.start_profile(self._manager, name, start_step, num_steps)
        return str(self._thread.run(started).data["path"])

    def stop_profile(self) -> str:
        """End the recording; returns the file."""
        return str(self._thread.run(control.stop_profile(self._manager)).data["path"])

    def save_sharded_model(
        self, path: str, pattern: str | None = None, max_size: int | None = None
    ) -> list[str]:
        """Save what each rank holds to the folder `path`, for load_format "sharded_state".

        `max_size`: bytes of a file. Returns the names of the files.
        """
        details = {"path": os.path.abspath(path), "pattern": pattern, "max_size": max_size}
        return self._thread.run(saved(self._manager, "save_sharded", details))

    def save_remote_model(self, url: str) -> list[str]:
        """Save what each rank holds to a store (redis://, s3://, file://), for format "remote"."""
        return self._thread.run(saved(self._manager, "save_remote", {"url": url}))

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._thread.run(self._manager.tokenize(text, add_special_tokens))

    def detokenize(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        return self._thread.run(self._manager.detokenize(ids, skip_special_tokens))

    def chat_prompt(self, messages: list[dict[str, Any]]) -> str | None:
        """A conversation as the model's chat template writes it; None if it has none.

        Special tokens are in the text: tokenize it without adding any.

        Raises:
            BadRequest: the template cannot take these messages.
        """
        templates = self._manager.templates
        if templates is None or not templates.has_template:
            return None
        return templates.render(messages)

    def get_server_info(self) -> dict[str, Any]:
        """Every resolved option without secrets, the sizes, the counters, the start-up times."""
        limits = self._manager.limits
        assert limits is not None
        return {
            **self._config.public(),
            "max_total_num_tokens": limits.max_total_tokens,
            "max_req_input_len": limits.max_request_tokens - 1,
            "memory_usage": self._manager.memory,
            "startup": self._manager.startup,
            "internal_states": [self._thread.run(self._manager.control("state")).data],
            "version": __version__,
        }

    def get_model_info(self) -> dict[str, Any]:
        """What is served."""
        return model_facts(self._config, self._launched.info)

    def get_all_child_pids(self) -> list[int]:
        """Process ids of the children."""
        return list(self._launched.supervisor.pids.values())

    def shutdown(self) -> None:
        """End everything; requests in flight fail. May be called twice and from any thread."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        atexit.unregister(self.shutdown)
        self._thread.close(self._manager.close())
        self._launched.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
