"""From prompts to rows that a policy loss can be computed on: sampling, environments, rewards, advantages, rounds."""
