"""`swaa-local demo`: the bundled model, with and without its schedule."""
