"""Files and child processes: input, output that appears complete or not at all, signals."""
