"""The paper's experiments, run from the command line; nothing here is part of the library.

Each table is a module, `python -m experiments.table2`; the others are the parts that tables share.
"""
