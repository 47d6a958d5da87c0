"""Between strings and token ids: tokenizer, chat template, incremental detokenization."""
