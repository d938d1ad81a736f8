"""What several commands print with: units, tables, spread, plots, progress. Knows nothing of models."""
