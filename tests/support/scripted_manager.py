"""A TokenizerManager whose scheduler is a script: requests in, prepared deltas out, no processes.

Everything in front of the sockets is real: tokenizer, templates, validation, fan-out, aborts.
"""

import asyncio
from collections.abc import Callable

from headrace.core.config import Config, Limits
from headrace.core.messages import (
    AbortRequest,
    Control,
    ControlReply,
    Delta,
    Deltas,
    FinishReason,
    GenerateRequest,
    Inbound,
    SchedulerStats,
    TokenLogprobs,
    unpack_ids,
)
from headrace.core.model_info import ModelInfo
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.ipc.address import Addresses
from headrace.text.chat import TemplateManager
from headrace.text.tokenizer import Tokenizer
from tests.support import tokenizers

WORDS = ["Hello", " wheel", "!"]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STATS = SchedulerStats(
    running=2,
    waiting=1,
    used_tokens=300,
    max_total_tokens=1000,
    prompt_tokens_total=400,
    cached_tokens_total=100,
    gen_throughput=12.5,
    max_running_requests=8,
)

Script = Callable[[GenerateRequest], list[Delta]]


class ScriptedManager(TokenizerManager):
    """Sends the deltas of `script` one per loop tick; a script without a finish never ends."""

    def __init__(self, config: Config, script: Script | None = None) -> None:
        tokenizer = Tokenizer(tokenizers.backend("byte_level"))
        info = model_info(tokenizer.vocab_size)
        templates = TemplateManager({"default": TEMPLATE})
        super().__init__(config, info, tokenizer, templates, Addresses("", "", "", ""))
        self.script = script or self.answer
        self.seen: list[GenerateRequest] = []
        self.aborted: list[AbortRequest] = []
        self.flushes = [True]
        self.stats = STATS
        self.open(
            Limits(max_total_tokens=1000, max_running_requests=8, context_length=256, page_size=16)
        )
        self.ready.set()

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _send(self, message: Inbound) -> None:
        if isinstance(message, GenerateRequest):
            self.seen.append(message)
            self._deliver_next(message.rid, self.script(message))
        elif isinstance(message, AbortRequest):
            self.aborted.append(message)
            self._flights.pop(message.rid, None)
        else:
            self._loop.call_soon(self._receive, [self._reply(message)])

    def _deliver_next(self, rid: str, deltas: list[Delta]) -> None:
        if deltas and rid in self._flights:
            self._loop.call_soon(self._receive, [Deltas([deltas[0]])])
            self._loop.call_soon(self._deliver_next, rid, deltas[1:])

    def _reply(self, message: Control) -> ControlReply:
        if message.verb != "flush_cache":
            return ControlReply(message.id, data={"left": 0} if message.verb == "drain" else {})
        ok = self.flushes.pop(0) if len(self.flushes) > 1 else self.flushes[0]
        return ControlReply(
            message.id, ok=ok, message="Cache flushed." if ok else "2 requests run."
        )

    def answer(self, request: GenerateRequest) -> list[Delta]:
        """WORDS, one token each, or fewer if max_new_tokens says so; ends with the end token."""
        assert self.tokenizer is not None
        most = request.sampling.max_new_tokens
        prompt = unpack_ids(request.ids).tolist()
        end = self.tokenizer.special_id("<|im_end|>")
        assert most is not None and end is not None
        pieces = [(self.tokenizer.encode(word, False), word) for word in WORDS] + [([end], "")]
        deltas: list[Delta] = []
        done = 0
        for ids, text in pieces[:most] or [([], "")]:
            done += len(ids)
            deltas.append(
                Delta(
                    request.rid,
                    ids=ids,
                    text=text,
                    prompt_tokens=len(prompt),
                    completion_tokens=done,
                    cached_tokens=len(prompt) // 2,
                    finish=self._finish(done, ids, end) if done >= most or ids == [end] else None,
                    logprobs=self._logprobs(request, ids),
                    input_logprobs=self._prompt_logprobs(request, prompt) if not deltas else None,
                )
            )
            if deltas[-1].finish:
                break
        return deltas

    def _finish(self, done: int, ids: list[int], end: int) -> FinishReason:
        return (
            FinishReason("stop", matched=end)
            if ids == [end]
            else FinishReason("length", length=done)
        )

    def _logprobs(self, request: GenerateRequest, ids: list[int]) -> TokenLogprobs | None:
        """Token i has the log-probability -i/8, its neighbors in the vocabulary less."""
        spec = request.logprobs
        if spec is None:
            return None
        return TokenLogprobs(
            tokens=ids,
            values=[-token / 8 for token in ids],
            top=[[(token + j, -(token + j) / 8) for j in range(spec.top)] for token in ids]
            if spec.top
            else [],
            ids=[[(token, -token / 8) for token in spec.ids] for _ in ids] if spec.ids else [],
        )

    def _prompt_logprobs(self, request: GenerateRequest, prompt: list[int]) -> TokenLogprobs | None:
        if request.logprobs is None or request.logprobs.start < 0:
            return None
        found = self._logprobs(request, prompt[request.logprobs.start :])
        assert found is not None
        if request.logprobs.start == 0:
            found.values[0] = None
            if found.top:
                found.top[0] = None
        return found


def model_info(vocab_size: int) -> ModelInfo:
    return ModelInfo(
        path="/models/tiny",
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        context_length=256,
        dtype="float32",
        eos_token_ids=(2,),
        hf={},
        generation={"temperature": 0.6, "top_k": 20},
    )
