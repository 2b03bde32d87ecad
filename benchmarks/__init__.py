"""Side-by-side measurements: one command each, both sides in one run, results kept beside the code."""
