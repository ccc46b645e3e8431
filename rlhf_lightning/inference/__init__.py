"""Using trained models: chat, generation, evaluation, comparison, text metrics and export."""
