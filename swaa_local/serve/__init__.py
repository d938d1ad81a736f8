"""`swaa-local serve`: llama-server with a schedule."""
