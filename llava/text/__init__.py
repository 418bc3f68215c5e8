"""Text: tokenizers, incremental detokenization, stop strings, labels."""
