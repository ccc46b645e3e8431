"""Hugging Face models: loading, LoRA, packed forward, token log-probabilities, scorers, references, saving."""
