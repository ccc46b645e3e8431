"""How cost grows: estimates and measurements."""
