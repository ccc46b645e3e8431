"""Rollouts: from prompts to training samples with advantages, through sampling, environments and rewards."""
