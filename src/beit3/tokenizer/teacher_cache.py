"""Keeps the features of a teacher that sees the same views of images again and again."""

import hashlib

import torch
from torch import Tensor

from beit3.tokenizer.teacher import Teacher


class CachedTeacher(Teacher):
    """Asks a teacher once for each view of each image and keeps its features in half precision.

    A view is recognized by its pixels, so a flipped image is another one, and neither ids nor
    splits can be confused. The features lie in main memory: 2 bytes for each of the P x F values of
    a view. Each process has its own.
    """

    def __init__(self, teacher: Teacher):
        super().__init__()
        self.teacher, self.dim = teacher, teacher.dim
        self.features: dict[bytes, Tensor] = {}
        """Digest of a view's pixels -> its features [P, F], float16."""

    def extract_features(self, images: Tensor) -> Tensor:
        """Returns the teacher's features [B, P, F], rounded to half precision at every visit."""
        digests = [compute_digest(image) for image in images.cpu()]
        new_indices: dict[bytes, int] = {}
        for index, digest in enumerate(digests):
            if digest not in self.features:
                new_indices.setdefault(digest, index)
        if new_indices:
            new_features = self.teacher.extract_features(images[list(new_indices.values())])
            self.features |= zip(new_indices, new_features.half().cpu(), strict=True)
        return torch.stack([self.features[digest] for digest in digests]).to(images.device).float()


def compute_digest(image: Tensor) -> bytes:
    """Returns a digest of an image's pixels."""
    pixels = image.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(pixels, digest_size=16).digest()
