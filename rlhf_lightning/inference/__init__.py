"""Trained models in use: chat, generation, comparison, text metrics and export."""
