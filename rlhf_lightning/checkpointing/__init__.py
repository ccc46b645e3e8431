"""Atomic checkpoints that resume exactly, stop signals, and the records of a run."""
