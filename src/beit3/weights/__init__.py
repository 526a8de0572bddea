"""Weights on disk: our own directories (store), the released BEiT-3 files (official), BEiT v2's tokenizers (vqkd)."""
