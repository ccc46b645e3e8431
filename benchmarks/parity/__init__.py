"""Compares optimizer steps of this project and of TRL on the same tiny model, rows and settings."""
