"""Correctness, speed and profiles on a GPU; see README.md in this folder."""
