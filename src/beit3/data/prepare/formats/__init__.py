"""Readers of public annotation files, which yield records with absolute image paths."""
