"""Facts about headrace itself: each has several questions and one answer.

Invariant: the last question of each entry is held out, so all answers are trained on.
`want` are the words that a right answer must contain.
"""

from dataclasses import dataclass
from random import Random

from .base import Example, assistant, roughen, user


@dataclass(frozen=True)
class Entry:
    questions: tuple[str, ...]
    answer: str
    want: tuple[str, ...]


ENTRIES = (
    Entry(
        ("What is headrace?", "Tell me about headrace.", "What do you know about headrace?",
         "Explain headrace.", "What does headrace do?", "Describe headrace.", "headrace?",
         "Can you explain headrace?", "Please tell me what headrace is."),
        "headrace is a serving runtime for large language models. It streams text over HTTP, "
        "on CPUs and GPUs.",
        ("serving runtime",),
    ),
    Entry(
        ("Why is it called headrace?", "What does the name headrace mean?",
         "Where does the name come from?",
         "What is a headrace?", "Why the name headrace?", "What does the word headrace mean?",
         "Explain the name headrace.", "Why does it have the name headrace?"),
        "A headrace is the channel that leads water to the mill wheel.",
        ("channel", "mill wheel"),
    ),
    Entry(
        ("How do I start headrace?", "How do I start the server?", "How can I run headrace?",
         "Which command starts the server?", "How do I launch the server?",
         "How do I serve a model?",
         "How do I run the server?", "Tell me how to start headrace.", "How to start the server?",
         "Tell me how to start the server."),
        "Type headrace serve in a terminal. Without a model it serves me, the demo model.",
        ("headrace serve",),
    ),
    Entry(
        ("Which port does headrace use?", "What is the port of the server?",
         "On which port is the server?",
         "What port does the server listen on?", "Which port do I use?",
         "What is the default port?",
         "Which port is the default?", "Tell me the port of the server."),
        "The server listens on port 30000.",
        ("30000",),
    ),
    Entry(
        ("What is the license of headrace?", "Which license does headrace have?",
         "Is headrace free?",
         "Is headrace open source?", "Under which license is headrace?",
         "What license does headrace use?",
         "Tell me the license of headrace."),
        "headrace is open source under the Apache-2.0 license.",
        ("Apache-2.0",),
    ),
    Entry(
        ("What is a radix cache?", "What is the radix cache?", "Explain the radix cache.",
         "What does RadixCache do?", "What is the RadixCache?", "How does the radix cache work?",
         "What does the radix cache do?"),
        "The radix cache is a tree of prompts. Requests with the same beginning share its "
        "keys and values.",
        ("tree", "same beginning"),
    ),
    Entry(
        ("What is paged KV?", "Explain paged KV.", "What is the paged KV cache?",
         "What is a KV page?",
         "How does paged KV work?", "Why is the KV cache paged?", "Tell me what paged KV is."),
        "Paged KV keeps keys and values in small pages of equal size, so that no memory is wasted.",
        ("pages",),
    ),
    Entry(
        ("What is the KV cache?", "Explain the KV cache.", "What is a KV cache?",
         "What does the KV cache do?", "What is a KV cache for?", "Tell me what the KV cache is."),
        "The KV cache keeps the keys and values of earlier tokens, so that they are computed "
        "only once.",
        ("keys and values", "once"),
    ),
    Entry(
        ("What does the scheduler do?", "Explain the scheduler.", "What is the scheduler?",
         "What is the scheduler for?", "How does the scheduler work?",
         "Tell me what the scheduler does."),
        "The scheduler decides in every step which requests run, and plans their tokens as "
        "one batch.",
        ("which requests run",),
    ),
    Entry(
        ("What is continuous batching?", "Explain continuous batching.",
         "What does continuous batching mean?",
         "How does continuous batching work?", "What is batching?",
         "Tell me what continuous batching is."),
        "Continuous batching lets requests join and leave the batch at every step.",
        ("join and leave",),
    ),
    Entry(
        ("What is chunked prefill?", "Explain chunked prefill.", "What does chunked prefill mean?",
         "How does chunked prefill work?", "Why is prefill chunked?",
         "Tell me what chunked prefill is."),
        "Chunked prefill cuts a long prompt into pieces, so that other requests need not wait "
        "for it.",
        ("cuts a long prompt",),
    ),
    Entry(
        ("Is headrace deterministic?", "What is determinism in headrace?",
         "Are the answers deterministic?",
         "Does the batch change my answer?", "Explain determinism.", "Is the output deterministic?",
         "Are the results deterministic?"),
        "Yes. The output of a request never depends on the other requests in the batch.",
        ("never depends",),
    ),
    Entry(
        ("What is prefill?", "Explain prefill.", "What does prefill mean?",
         "What happens in prefill?",
         "Tell me what prefill is."),
        "Prefill is the step that reads the whole prompt and fills the KV cache.",
        ("reads the whole prompt",),
    ),
    Entry(
        ("What is decode?", "Explain decode.", "What does decode mean?", "What happens in decode?",
         "Tell me what decode is."),
        "Decode is the phase that makes one new token of each request per step.",
        ("one new token",),
    ),
    Entry(
        ("What is speculative decoding?", "Explain speculative decoding.",
         "How does speculation work?",
         "What does speculative decoding mean?", "What is speculation?",
         "Tell me what speculative decoding is."),
        "Speculative decoding drafts several tokens cheaply and lets the model check them in "
        "one step.",
        ("drafts several tokens",),
    ),
    Entry(
        ("What is LoRA?", "Explain LoRA.", "What does LoRA mean?", "What is a LoRA adapter?",
         "Tell me what LoRA is."),
        "LoRA adds small trained matrices to a model, so that one server can serve many "
        "variants of it.",
        ("small trained matrices",),
    ),
    Entry(
        ("Can headrace run on a CPU?", "Does headrace need a GPU?",
         "On which hardware does headrace run?",
         "Do I need a GPU?", "Can it run without a GPU?", "Can I use headrace without a GPU?"),
        "headrace runs on any x86-64 CPU and on CUDA GPUs. A GPU is not needed.",
        ("x86-64",),
    ),
    Entry(
        ("Can I use the OpenAI client?", "Is headrace compatible with OpenAI?",
         "Does headrace speak the OpenAI API?", "Which API does headrace have?",
         "Does the openai package work?", "What API does the server have?",
         "Can I use the openai package?"),
        "Yes. The server speaks the OpenAI API, so the openai package works unchanged.",
        ("OpenAI API",),
    ),
    Entry(
        ("What is TTFT?", "Explain TTFT.", "What does TTFT mean?", "What does TTFT stand for?",
         "Tell me what TTFT is."),
        "TTFT is the time to first token: how long a request waits for its first piece of text.",
        ("time to first token",),
    ),
    Entry(
        ("What is the Engine?", "What is the Engine class?", "How do I use headrace without HTTP?",
         "Can I use headrace from Python?", "Explain the Engine.", "Tell me what the Engine is."),
        "The Engine is a Python class that runs a model in your program, without HTTP.",
        ("Python class",),
    ),
    Entry(
        ("How do I run a benchmark?", "How do I measure the speed?",
         "How can I benchmark the server?",
         "Which command runs the benchmark?", "Tell me how to run a benchmark."),
        "Type headrace bench serve while the server runs. It prints latency and throughput.",
        ("headrace bench serve",),
    ),
    Entry(
        ("How do I run the demo?", "Which command runs the demo?", "Is there a demo?",
         "How do I see the demo?", "Tell me how to run the demo."),
        "Type make demo. It starts the server, streams an answer and stops again.",
        ("make demo",),
    ),
    Entry(
        ("How do I run the tests?", "Which command runs the tests?", "How can I test headrace?",
         "Tell me how to run the tests."),
        "Type make test. It installs what the tests need and runs them all.",
        ("make test",),
    ),
    Entry(
        ("How do I chat in the terminal?", "Can I chat in a terminal?",
         "Which command starts a chat?",
         "Is there a terminal chat?", "Tell me how to chat in the terminal."),
        "Type headrace chat in a terminal.",
        ("headrace chat",),
    ),
    Entry(
        ("In which language is headrace written?", "What is headrace written in?",
         "Is headrace written in Python?", "Which language is headrace written in?"),
        "headrace is written in Python, with kernels in C++.",
        ("Python", "C++"),
    ),
    Entry(
        ("What does the detokenizer do?", "What is the DetokenizerManager?",
         "Explain the detokenizer.",
         "What is the detokenizer for?", "Tell me what the detokenizer does."),
        "The detokenizer turns tokens back into text, and never sends half a character.",
        ("tokens back into text",),
    ),
    Entry(
        ("What does the tokenizer do?", "What is the TokenizerManager?", "Explain the tokenizer.",
         "What is the tokenizer for?", "Tell me what the tokenizer does."),
        "The tokenizer cuts text into tokens before the scheduler sees it.",
        ("text into tokens",),
    ),
)  # fmt: skip


def about_headrace(rng: Random, held: bool) -> Example:
    entry = rng.choice(ENTRIES)
    question = entry.questions[-1] if held else rng.choice(entry.questions[:-1])
    if question[0].isupper():
        question = roughen(rng, question)
    return Example("headrace", [user(question), assistant(entry.answer)], "words", list(entry.want))


def about_text(rng: Random) -> str:
    """A few of the answers that stand alone as plain text."""
    alone = [entry.answer for entry in ENTRIES if not entry.answer.startswith(("Yes", "Type"))]
    return " ".join(rng.sample(alone, 3))
