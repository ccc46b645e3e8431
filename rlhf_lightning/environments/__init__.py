"""Environments that answer the policy, the tool environment, and calls of user code."""
