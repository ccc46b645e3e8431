"""Engines that sample token ids, and the choice of a token from logits."""
