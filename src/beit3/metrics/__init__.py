"""Scores from predictions and records, in numpy alone."""
