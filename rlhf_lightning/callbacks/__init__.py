"""Callbacks of the stages: export, progress, samples, predictions, invariants."""
