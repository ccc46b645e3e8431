"""Signs that a run goes wrong: curves over steps, and a small check for each failure."""
