"""The network: a Multiway Transformer over images, texts and pairs (paper section 2.1)."""
