"""Where a model comes from: a path, a folder, a hub repository. Knows names and files; nothing of the engine."""
