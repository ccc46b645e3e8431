"""Hugging Face models: loading, LoRA, token scoring, scorers, references, saving."""
