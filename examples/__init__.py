"""Small complete programs that use the package from outside; `tests/test_examples.py` runs each of them."""
