"""Using trained models: chat, comparison, benchmarks and text metrics."""
