"""Parts of `benchmarks/step.py`: what is computed, by this project and by TRL."""
