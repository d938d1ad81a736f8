"""`swaa-local calibrate`: finds the schedule that keeps a model's answers, on the machine that it runs on."""
