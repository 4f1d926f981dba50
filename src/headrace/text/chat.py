"""Messages to prompt: the chat templates of a model.

Finds them where transformers does (plus a file or a built-in name given by the operator), picks
one and renders it. Does not know HTTP, token ids or reasoning and tool parsers. Invariant: the
prompt is the string that transformers' `apply_chat_template` gives for the same template and
messages.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from headrace.core.errors import BadRequest, LoadError
from headrace.text.messages import normalize_messages, plain_json
from headrace.text.special_tokens import named_special_tokens, read_json, tokenizer_config
from headrace.text.template import ChatTemplate

_BUILTIN = Path(__file__).parent / "templates"
# Marks the end of a message that is to be continued. The space shows whether the template trims.
_CONTINUE = "\ue000headrace-continue\ue000 "


class TemplateManager:
    """The named templates of one model.

    `name` chooses one. Without it, "tool_use" (if there is one) serves requests with tools and
    "default" all others. `special_tokens` are variables of every template (bos_token, ...).
    """

    def __init__(
        self,
        sources: dict[str, str],
        special_tokens: dict[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        self._special_tokens = special_tokens or {}
        self._templates = {key: ChatTemplate(source) for key, source in sources.items()}
        self._name = name or "default"
        if self._templates and self._name not in self._templates:
            raise LoadError(
                f"there is no chat template {self._name!r}; there are {sorted(self._templates)}"
            )
        self._switch_for_tools = name is None and "tool_use" in self._templates

    @classmethod
    def load(
        cls, model_path: Path, override: str | None = None, name: str | None = None
    ) -> "TemplateManager":
        """Templates of a checkpoint folder, or of `override`: a template file or built-in name.

        `LoadError` if there is something that cannot be used; having no template is fine.
        """
        config = tokenizer_config(model_path)
        sources = _override_sources(override) if override else _model_sources(model_path, config)
        return cls(sources, named_special_tokens(config), name)

    @property
    def has_template(self) -> bool:
        return bool(self._templates)

    @property
    def content_format(self) -> Literal["string", "openai"]:
        """Whether message content must be a string or may be a list of parts."""
        return self._select(tools=False).content_format if self.has_template else "string"

    @cached_property
    def supports_tools(self) -> bool:
        """Whether a list of tools would reach the prompt."""
        return self.has_template and self._select(tools=True).supports_tools

    def source(self, tools: bool) -> str:
        """The text of the template that serves requests with or without tools."""
        return self._select(tools).source

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for OpenAI-style `messages`; `kwargs` are further template variables.

        `continue_final_message` leaves the last message open for the model to go on with; else
        `add_generation_prompt` (the default) opens an answer. `BadRequest` names the message at
        fault.
        """
        if add_generation_prompt and continue_final_message:
            raise BadRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                field="continue_final_message",
            )
        template = self._select(tools=bool(tools))
        chat = normalize_messages(messages, template)
        if continue_final_message:
            _mark_end(chat[-1])
        variables = {
            **self._special_tokens,
            "documents": None,
            **plain_json(kwargs, "chat_template_kwargs"),
            "messages": chat,
            "tools": plain_json(tools, "tools"),
            "add_generation_prompt": (
                not continue_final_message
                if add_generation_prompt is None
                else add_generation_prompt
            ),
        }
        prompt = template.render(variables)
        return _cut_at_mark(prompt) if continue_final_message else prompt

    def _select(self, tools: bool) -> ChatTemplate:
        if not self._templates:
            raise BadRequest(
                "this model has no chat template; start the server with --chat-template",
                field="messages",
            )
        return self._templates["tool_use" if tools and self._switch_for_tools else self._name]


def builtin_names() -> list[str]:
    """Names that `TemplateManager.load` accepts as `override`."""
    return sorted(path.stem for path in _BUILTIN.glob("*.jinja"))


def _model_sources(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Template files of a model folder by name; files win over tokenizer_config.json."""
    sources = {
        path.stem: _read(path)
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (file := folder / "chat_template.jinja").is_file():
        sources["default"] = _read(file)
    if sources:
        return sources
    legacy = read_json(folder / "chat_template.json").get("chat_template")
    return _named_sources(config.get("chat_template") or legacy)


def _named_sources(value: Any) -> dict[str, str]:
    """`chat_template` of tokenizer_config.json: a string, a mapping or a list of named ones."""
    if not value:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = value if isinstance(value, dict) else {e["name"]: e["template"] for e in value}
    except (TypeError, KeyError) as error:
        raise LoadError("chat_template must be a string or a list of named templates") from error
    return {str(name): str(source) for name, source in named.items()}


def _override_sources(override: str) -> dict[str, str]:
    if override in builtin_names():
        return {"default": _read(_BUILTIN / f"{override}.jinja")}
    path = Path(override)
    if not path.is_file():
        raise LoadError(
            f"chat template {override!r} is neither a file nor one of {', '.join(builtin_names())}"
        )
    if path.suffix == ".json":
        return _named_sources(read_json(path).get("chat_template"))
    return {"default": _read(path)}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error


def _mark_end(message: dict[str, Any]) -> None:
    """Append the mark to the text of a message."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE
    elif content:
        content[-1]["text"] += _CONTINUE
    else:
        raise BadRequest(
            "continue_final_message needs text in the last message", field="continue_final_message"
        )


def _cut_at_mark(prompt: str) -> str:
    mark = prompt.rfind(_CONTINUE.strip())
    if mark < 0:
        raise BadRequest(
            "the chat template does not print the last message, so it cannot be continued",
            field="continue_final_message",
        )
    text = prompt[:mark] if prompt.startswith(_CONTINUE, mark) else prompt[:mark].rstrip()
    return text.replace(_CONTINUE, "").replace(_CONTINUE.strip(), "")  # printed more than once
