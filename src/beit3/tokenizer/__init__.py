"""What turns images and texts into discrete targets: the visual tokenizer with its teachers, and the text tokenizer."""
