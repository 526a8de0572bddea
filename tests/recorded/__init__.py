"""Numbers that the project recorded itself from torchscale of the package index."""
