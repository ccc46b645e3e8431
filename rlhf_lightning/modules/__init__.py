"""The three LightningModules: they wire parts and log."""
