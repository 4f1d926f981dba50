"""The other processes as a TokenizerManager sees them: hears it, says what a test wants."""

import asyncio
from typing import Any

from headrace.core.config import Config, Limits
from headrace.core.messages import Deltas, Inbound, SchedulerStats
from headrace.core.model_info import ModelInfo
from headrace.ipc.address import Addresses
from headrace.ipc.channels import Receiver, Sender

LIMITS = Limits(max_total_tokens=4096, max_running_requests=8, context_length=64, page_size=16)


def model_info(vocab_size: int = 1000) -> ModelInfo:
    """Facts of a model that does not exist."""
    return ModelInfo(
        path="",
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=vocab_size,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        context_length=64,
        dtype="float32",
        eos_token_ids=(0,),
        hf={},
        generation={},
    )


def config(**options: Any) -> Config:
    """A configuration with some options set."""
    return Config.from_flat(options)


class FakeScheduler:
    """Scheduler and detokenizer in one, on the loop of the test."""

    def __init__(self, addresses: Addresses) -> None:
        self._inbox: Receiver[Inbound] = Receiver(addresses.scheduler, Inbound)
        self._outbox = Sender(addresses.tokenizer)
        self._heard: asyncio.Queue[Any] = asyncio.Queue()
        self._inbox.listen(
            asyncio.get_running_loop(), lambda news: [self._heard.put_nowait(one) for one in news]
        )

    async def hear(self) -> Any:
        """The next message."""
        async with asyncio.timeout(30):
            return await self._heard.get()

    async def hears_nothing(self) -> bool:
        """Nothing comes for a moment."""
        await asyncio.sleep(0.05)
        return self._heard.empty()

    def say(self, *deltas: Any, stats: SchedulerStats | None = None) -> None:
        self._outbox.send(Deltas(list(deltas), stats))

    def send(self, message: Any) -> None:
        self._outbox.send(message)

    def close(self) -> None:
        self._inbox.close()
        self._outbox.close()
