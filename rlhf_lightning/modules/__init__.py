"""The LightningModules for SFT, preference learning and policy RL."""
