"""Finds terms in texts, in any spelling of Unicode, for rules of a filter and for rewards."""
