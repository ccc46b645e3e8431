"""Environments: who answers the policy, its tools, and calls of a user's code."""
