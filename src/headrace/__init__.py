"""headrace: an LLM serving runtime. Heavy parts are imported when first used."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "Runtime", "__version__"]

if TYPE_CHECKING:
    from headrace.engine.engine import Engine
    from headrace.engine.runtime import Runtime


def __getattr__(name: str) -> Any:
    """`headrace.Engine` and `headrace.Runtime` without paying their imports up front."""
    if name == "Engine":
        from headrace.engine.engine import Engine

        return Engine
    if name == "Runtime":
        from headrace.engine.runtime import Runtime

        return Runtime
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
