"""Checkpoints that are written atomically and resume exactly, stop signals, and the records of a run."""
