"""A package so that `python -m tests.parity` means this folder, whatever an installed distribution calls `tests`."""
