"""Learning benchmarks: tasks with a known optimum, and over-optimization of a reward."""
