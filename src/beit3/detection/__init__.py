"""Objects and their outlines from a trunk's features: ViTDet's pyramid with a cascade of heads
(arXiv:2203.16527, section 3)."""
