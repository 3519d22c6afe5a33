"""GGUF, the file that llama.cpp runs: what its header says, and what models and tokenizers are called in it."""
