"""Where records lie: JSON lines, tars, arrays of token ids, upstream's index files, and predictions."""
