"""What people may read on a terminal: numbers with their units, and foreign text made harmless. Imports nothing."""
