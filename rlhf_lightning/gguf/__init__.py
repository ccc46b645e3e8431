"""GGUF files, as llama.cpp writes them: read with bounds, and converted once to an ordinary model folder."""
