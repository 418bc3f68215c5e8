"""A pair of GGUF files, as llama.cpp reads them, as a model folder: metadata, tensors, tokenizer."""
