"""What every route needs: the manager, the configuration, and what follows from them.

Also `Job`, the form in which an adapter hands its work over. Holds no state of a request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from headrace.core.config import Config
from headrace.core.errors import BadRequest, NotFound, Overloaded
from headrace.core.messages import GenerateRequest, SamplingParams
from headrace.core.model_info import ModelInfo
from headrace.frontend.encode import check_task
from headrace.frontend.sampling import native_defaults, openai_defaults
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.server.sse import EventReply, WholeReply, Wire
from headrace.text.chat import TemplateManager
from headrace.text.tokenizer import Tokenizer


class Stamp(NamedTuple):
    """Identity of one answer: a fresh id and the time (unix seconds)."""

    id: str
    created: int


class Job(NamedTuple):
    """One HTTP request, understood. `reply` streams exactly when it has a method `event`.

    `requests` are single sequences; a reply numbers them by their place in the list. `ignored`
    names fields of the body that have no effect.
    """

    requests: list[GenerateRequest]
    reply: EventReply | WholeReply
    id: str = ""
    ignored: Sequence[str] = ()
    wire: Wire = Wire()


@dataclass(frozen=True)
class Context:
    """Shared by all routes of one app."""

    manager: TokenizerManager
    config: Config
    info: ModelInfo
    started: int
    openai_sampling: SamplingParams
    native_sampling: SamplingParams
    preferred_max_tokens: bool

    @classmethod
    def create(
        cls, manager: TokenizerManager, config: Config, info: ModelInfo, started: int
    ) -> "Context":
        """`started` is the unix time shown as the model's creation."""
        return cls(
            manager,
            config,
            info,
            started,
            openai_defaults(config.serve, info),
            native_defaults(config.serve),
            "max_new_tokens" in msgspec.json.decode(config.serve.preferred_sampling_params),
        )

    @property
    def model_name(self) -> str:
        """The name clients see."""
        return self.config.model.served_model_name or self.config.model.model_path

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens."""
        return self.config.model.context_length or self.info.context_length

    def max_tokens(self, asked: int | None, usual: int | None) -> int | None:
        """What the request asks, else what the operator prefers, else the protocol's `usual`."""
        if asked is not None:
            return asked
        return self.openai_sampling.max_new_tokens if self.preferred_max_tokens else usual

    def check_model(self, name: str | None) -> None:
        """Any name will do, unless --strict-model-name.

        Raises:
            NotFound: code model_not_found.
        """
        if name and name != self.model_name and self.config.serve.strict_model_name:
            raise self.unknown_model(name)

    def unknown_model(self, name: str) -> NotFound:
        """The error for a model that is not served here."""
        error = NotFound(
            f"The model {name!r} does not exist; this server has {self.model_name!r}.",
            field="model",
        )
        error.code = "model_not_found"
        return error

    def check_ready(self) -> None:
        """Raise Overloaded (503) before the server is ready and once it drains."""
        if not self.manager.ready.is_set():
            raise Overloaded("The server is starting or ending; try again in a moment.")

    @property
    def templates(self) -> TemplateManager:
        """The chat templates; BadRequest on a server without a tokenizer."""
        if self.manager.templates is None:
            self.tokenizer("messages")
            raise BadRequest("messages: this server has no chat template", field="messages")
        if not self.manager.templates.has_template:
            check_task(self.info, "generate")  # says more than that there is no template
        return self.manager.templates

    def tokenizer(self, wanted_by: str) -> Tokenizer:
        """The tokenizer; BadRequest for the field `wanted_by` on a server without one."""
        if self.manager.tokenizer is None:
            raise BadRequest(
                f"{wanted_by}: this server runs without a tokenizer (--skip-tokenizer-init); "
                "use /generate with input_ids",
                field=wanted_by,
            )
        return self.manager.tokenizer
