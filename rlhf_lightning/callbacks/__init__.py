"""Callbacks of all stages: progress, sample tables, predictions, export, and the memory estimate."""
