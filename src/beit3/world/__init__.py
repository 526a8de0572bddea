"""The embedded world: simple scenes with images, texts, questions and exact labels."""
