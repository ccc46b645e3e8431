"""Losses, advantages and estimators as pure tensor functions, with the classes that hold their options.

This package imports nothing else from the project, so every function can be used on its own.
"""
