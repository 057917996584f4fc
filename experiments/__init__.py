"""Everything with side effects: configuration, data, training loop, checkpoints, reports, command line; one module per paper."""
