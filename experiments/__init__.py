"""The experiments, run from the command line; nothing here is part of the library.

Each module is a command, `python -m experiments.table2`. Below them, each importing from itself and the
earlier ones: `networks`, `output` (stored rows, tables, pictures, the terminal), `data`, `training`.
Folder `results` holds stored runs, and no code.
"""
