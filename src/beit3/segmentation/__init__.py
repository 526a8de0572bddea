"""Semantic segmentation: ViT-Adapter around the trunk, a Mask2Former head, and inference over
windows and scales."""
