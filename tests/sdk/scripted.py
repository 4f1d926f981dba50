"""A model that writes what the tests of a package expect a large model to write, in real text.

Everything in front of the scheduler is real, the parsers too; the answer is the first of `RULES`
whose key is in the last turn of the prompt, sent in pieces of a few characters.
"""

import msgspec

from headrace.core.messages import Delta, GenerateRequest
from tests.support.api_server import Model

PIECE = 7
_MAGIC = '<tool_call>\n{"name": "magic_function", "arguments": {"input": 3}}\n</tool_call>'
_NO_ARGUMENTS = '<tool_call>\n{"name": "magic_function_no_args", "arguments": {}}\n</tool_call>'
_CUSTOMER = (
    '<tool_call>\n{"name": "unicode_customer", "arguments": '
    '{"customer_name": "你好啊集团 こんにちは株式会社", "description": "技术公司"}}\n</tool_call>'
)
RULES = {
    "magic_function(3)": _MAGIC,
    "magic_function_no_args()": _NO_ARGUMENTS,
    "Create a customer": _CUSTOMER,
    "joke": '{"setup": "Why is the cat on the mill?", "punchline": "It likes the mews."}',
}


class Speaker(Model):
    """Answers by `RULES`."""

    def script(self, request: GenerateRequest) -> list[Delta]:
        whole = super().script(request)
        prompt = self.prompts[-1]
        text = next((text for key, text in RULES.items() if key in prompt), "Hello!")
        pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
        deltas = [
            msgspec.structs.replace(whole[0], text=piece, completion_tokens=done)
            for done, piece in enumerate(pieces, 1)
        ]
        last = msgspec.structs.replace(whole[-1], completion_tokens=len(pieces) + 1)
        return [*deltas, last]
