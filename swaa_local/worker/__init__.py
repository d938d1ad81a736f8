"""`swaa-local worker`: lend this machine's memory and compute to another one's models."""
