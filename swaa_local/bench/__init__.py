"""`swaa-local bench`: what schedules cost."""
