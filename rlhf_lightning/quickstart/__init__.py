"""The embedded default: a small model, tokenizer and data made on the spot, run through the ordinary driver."""
