"""Pipelines of several stages: plan, execution, and verification of a finished run."""
