"""Pairs from people: comparisons of two answers, a page on which people choose, their decisions, and agreement."""
