"""Trained models: loading one from wherever it is, and what a directory says of the one in it."""
