"""Studies: what is compared, how often, and what came out, in files that tables and plots are made from.

A `Study` says which runs there are and does one; `run_study` does those that are missing and keeps every result in a
JSON file; `tables` and `plots` show what is in such a file. Nothing here imports torch before a run needs it.
"""
