"""Text corpora to token ids."""
