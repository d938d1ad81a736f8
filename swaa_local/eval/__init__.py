"""`swaa-local eval`: what schedules answer."""
