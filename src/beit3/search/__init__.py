"""Search of images and texts by their vectors: folders of vectors, stores, queries, re-ranking."""
