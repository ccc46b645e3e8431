"""What runs on a GPU: is it right, how fast is it, and why is it not faster; see the README beside this."""
