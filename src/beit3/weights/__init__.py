"""Weights on disk: our directories (store), released files (official, released, vqkd), from one to the other (convert)."""
