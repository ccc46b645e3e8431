"""Loads GGUF files of llama.cpp: reads them with bounds checks, and converts each one once to a model folder."""
