"""GGUF files: headers, metadata, splits, copies, and the schedule's keys. Knows schedules; runs nothing."""
