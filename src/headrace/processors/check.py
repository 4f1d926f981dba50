"""What the main process refuses before a request is sent: unknown processors, wrong parameters."""

from headrace.core.errors import BadRequest
from headrace.core.messages import GenerateRequest
from headrace.processors.registry import Registry


class ProcessorCheck:
    """Raises BadRequest for a request whose processor cannot be made."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __call__(self, request: GenerateRequest) -> None:
        sampling = request.sampling
        if sampling.custom_logit_processor:
            self._registry.make(sampling)
        elif sampling.custom_params:
            raise BadRequest(
                "custom_params: they are those of a custom_logit_processor, which is missing",
                field="custom_params",
            )
