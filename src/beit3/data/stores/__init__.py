"""Files with records: JSON lines, tars, token ids, the release's index files; and predictions."""
