"""GGUF, the format of llama.cpp: read, written, and the tokenizers in it."""
