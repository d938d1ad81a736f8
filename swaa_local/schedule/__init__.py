"""Schedules: which layer sees what, and what that costs. Pure rules: no click, no llama_cpp, no files."""
