"""Data from files to batches: rows, rendering, batching, and the three data modules."""
