"""Parts of `benchmarks/step.py`: the steps of this project and of TRL."""
