"""Object detection and instance segmentation: ViTDet's pyramid and a cascade of heads
(arXiv:2203.16527, section 3)."""
