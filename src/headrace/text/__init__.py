"""Text and tokens: tokenizer, incremental detokenizer, stop strings and chat templates."""
