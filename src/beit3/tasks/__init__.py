"""One file, one task. Add a file and every verb knows it."""
