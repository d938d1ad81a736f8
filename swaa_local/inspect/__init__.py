"""`swaa-local inspect`: what a file says of its schedule, and what that costs."""
