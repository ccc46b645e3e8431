"""How cost grows: a model on paper, and measurements."""
