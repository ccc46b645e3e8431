"""Pipelines of several stages: the plan, its execution, and verification of a finished run."""
