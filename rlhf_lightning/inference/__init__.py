"""Use of trained models: chat, generation, comparison, text metrics and export."""
