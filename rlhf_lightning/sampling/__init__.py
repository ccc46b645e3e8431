"""Engines that sample token ids, and how a token is chosen from logits."""
