"""Sampling engines, and sampling of a token from logits."""
