"""Several stages in a row: the plan, the run, and what is handed from one to the next."""
