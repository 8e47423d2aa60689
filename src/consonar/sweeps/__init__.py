"""Studies: the same recipe with other options over seeds; start at `work.run_sweep`."""
