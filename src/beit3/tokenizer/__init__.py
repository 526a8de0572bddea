"""Turns images and texts into discrete targets: the visual tokenizer, its teachers, text."""
