"""Semantic segmentation: ViT-Adapter around the trunk, a Mask2Former head, and testing by windows
and scales."""
