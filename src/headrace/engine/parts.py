"""From a configuration to a resolved one, the model's facts, and its tokenizer. No torch."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.assets import demo_model_path
from headrace.core.config import Config
from headrace.core.errors import BadRequest, LoadError
from headrace.core.hardware import Hardware, detect, node_cores
from headrace.core.model_info import ModelInfo, read_model_info
from headrace.core.resolve import resolve
from headrace.loader.files import resolve_model_path
from headrace.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from headrace.frontend.prepare import RequestCheck
    from headrace.grammar.engine import Backend
    from headrace.processors.registry import Registry
    from headrace.text.chat import TemplateManager

DEMO_NAME = "headrace-demo"


def locate(config: Config) -> Config:
    """The configuration with local folders in place of hub ids, and a name for clients.

    Raises:
        LoadError: there is no such model.
    """
    model = config.model
    given = model.model_path or str(demo_model_path())
    name = model.served_model_name or model.model_path or DEMO_NAME
    path = resolve_model_path(given, model.revision, model.download_dir, model.load_format)
    tokenizer = path
    if model.tokenizer_path:
        tokenizer = resolve_model_path(model.tokenizer_path, "", model.download_dir)
    located = dataclasses.replace(
        model, model_path=str(path), tokenizer_path=str(tokenizer), served_model_name=name
    )
    return dataclasses.replace(config, model=located)


def settle(config: Config) -> tuple[Config, ModelInfo, list[str]]:
    """(resolved configuration, facts of the model, notes) of a located configuration.

    Raises:
        LoadError: the checkpoint cannot be read. BadRequest: an option contradicts it.
    """
    info = read_model_info(
        Path(config.model.model_path), _overrides(config), is_embedding=config.model.is_embedding
    )
    resolved, notes = resolve(config, info, usable(config.run.numa_node))
    return resolved, info, notes


def usable(node: int | None) -> Hardware:
    """What the model may use: of a NUMA node, if one is given, only its cores.

    Raises:
        BadRequest: this process may use none of them, or there is no such node.
    """
    hardware = detect()
    if node is None:
        return hardware
    cores = node_cores(node) & os.sched_getaffinity(0)
    if not cores:
        raise BadRequest(
            f"--numa-node {node}: there is no such node, or none of its cores may be used",
            field="numa_node",
        )
    return msgspec.structs.replace(hardware, cores=min(hardware.cores, len(cores)))


def load_tokenizer_of(config: Config) -> Tokenizer | None:
    """The tokenizer, or None with --skip-tokenizer-init.

    Raises:
        LoadError: there is none, or its text cannot be streamed.
    """
    if config.model.skip_tokenizer_init:
        return None
    tokenizer = load_tokenizer(Path(config.model.tokenizer_path))
    if decoder := tokenizer.contextual_decoder():
        raise LoadError(
            f"text of a tokenizer with the {decoder} decoder cannot be streamed; "
            "use --skip-tokenizer-init"
        )
    return tokenizer


def load_templates_of(config: Config) -> "TemplateManager | None":
    """The chat templates, or None with --skip-tokenizer-init."""
    if config.model.skip_tokenizer_init:
        return None
    from headrace.text.chat import TemplateManager

    folder = Path(config.model.tokenizer_path)
    return TemplateManager.load(folder, config.model.chat_template or None)


def request_checks(
    config: Config, info: ModelInfo, tokenizer: Tokenizer | None
) -> "list[RequestCheck]":
    """What features refuse before a request is sent."""
    from headrace.grammar.check import GrammarCheck
    from headrace.processors.check import ProcessorCheck

    registry = processors(config, info, lambda: tokenizer)
    return [GrammarCheck(tokenizer, grammar_backend(config)), ProcessorCheck(registry)]


def processors(
    config: Config, info: ModelInfo, tokenizer: "Callable[[], Tokenizer | None]"
) -> "Registry":
    """The logit processors that requests may name; `tokenizer` is called when one is used.

    Raises:
        LoadError: a plug-in cannot be had.
    """
    from headrace.processors import Facts
    from headrace.processors.registry import Registry

    def facts() -> Facts:
        return Facts(info.vocab_size, info.eos_token_ids, tokenizer())

    return Registry(config.run.logit_processors, facts)


def grammar_backend(config: Config) -> "Backend | None":
    """What enforces grammars here, if anything: it takes a model and a tokenizer.

    Raises:
        BadRequest: it was asked for by name and cannot be had.
    """
    from headrace.grammar.engine import BACKENDS

    backend = config.run.grammar_backend
    missing = ""
    if config.model.skip_tokenizer_init:
        missing = "a tokenizer, which --skip-tokenizer-init leaves out"
    elif config.run.runner == "fake":
        missing = "a model, which --runner fake leaves out"
    if missing and backend not in ("auto", "none"):
        raise BadRequest(f"--grammar-backend {backend} needs {missing}", field="grammar_backend")
    if backend == "none" or missing:
        return None
    found = BACKENDS[backend]
    if not found.installed:
        raise BadRequest(
            f"--grammar-backend {backend} needs {' and '.join(found.packages)}: "
            f"pip install 'headrace[{found.name}]'",
            field="grammar_backend",
        )
    return found


def with_tokenizer_ends(info: ModelInfo, tokenizer: Tokenizer | None) -> ModelInfo:
    """The facts of a model whose output also ends at the tokenizer's own end tokens."""
    own = tokenizer.eos_token_ids if tokenizer else ()
    ends = tuple(i for i in dict.fromkeys((*info.eos_token_ids, *own)) if i < info.vocab_size)
    return msgspec.structs.replace(info, eos_token_ids=ends)


def _overrides(config: Config) -> dict[str, Any]:
    try:
        return msgspec.json.decode(config.model.json_model_override_args, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise BadRequest(
            f"--json-model-override-args must be a JSON object: {error}",
            field="json_model_override_args",
        ) from None
