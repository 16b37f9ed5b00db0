"""The command line, `petra-zoo`."""
