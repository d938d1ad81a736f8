"""What runs in a process of its own: a crash there ends neither the command nor its files."""
