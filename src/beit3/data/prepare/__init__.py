"""Public annotation files to records: readers of formats, checks, splits and statistics."""
