"""A training run: what it is made of, its state on disk, resuming, stopping, rates, log lines."""
