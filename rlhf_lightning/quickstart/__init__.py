"""The quickstart: a small generated model, tokenizer and data set, run through the ordinary pipeline."""
