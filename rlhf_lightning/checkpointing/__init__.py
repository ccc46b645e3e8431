"""Checkpoints: written whole or not at all, resumed exactly; what ends a run, and what a run writes down as it goes."""
