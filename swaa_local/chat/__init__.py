"""`swaa-local chat`."""
