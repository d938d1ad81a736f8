"""What runs in a process of its own: upstream's code, which a crash there does not take the command down with."""
