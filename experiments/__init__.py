"""The paper's experiments, run from the command line; nothing here is part of the library.

Each table is a command, `python -m experiments.table2`; the other modules are what the tables share.
"""
