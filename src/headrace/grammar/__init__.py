"""Structured output: a request's tokens follow its JSON schema, regex, EBNF or structural tags.

    source     what may be asked for -> the engine's own language, or a refusal; pure text
      schema   JSON Schema: which keywords are enforced; `patterns` are its regular expressions
      ebnf     EBNF grammars; `tags` structural tags
    source_xgrammar, schema_xgrammar, regex     the same for xgrammar, which is lax
    engine     what a backend is, and the table of them: engine_llguidance, engine_xgrammar
    vocabulary, compiler      the bytes of every token; the cache of compiled grammars
    gate       the scheduler's half, without torch
    masks      the device's half

Rule: never weaker than asked. What cannot be enforced is refused with its place.
"""
