"""A teacher whose features are kept is asked once for each view."""

import pytest
import torch
from torch import Tensor

from beit3.tokenizer.teacher import Teacher
from beit3.tokenizer.teacher_cache import CachedTeacher


class CountingTeacher(Teacher):
    """Mean colors of four patches; counts the images that it is asked for."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.num_asked = 0

    def extract_features(self, images: Tensor) -> Tensor:
        self.num_asked += len(images)
        pixels = images.double() / 300  # no multiple of what float16 represents
        return torch.nn.functional.avg_pool2d(pixels, 4).flatten(2).transpose(1, 2).float()


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_each_view_is_computed_once_and_always_the_same(images):
    inner = CountingTeacher()
    teacher = CachedTeacher(inner)
    expected = inner.extract_features(images).half().float()
    inner.num_asked = 0
    assert torch.equal(teacher.extract_features(images[:3]), expected[:3])
    assert inner.num_asked == 3
    assert torch.equal(teacher.extract_features(images[[4, 1, 0, 4]]), expected[[4, 1, 0, 4]])
    assert inner.num_asked == 4, "one image is new, and it is twice in the batch"
    assert torch.equal(teacher.extract_features(images), expected)
    assert inner.num_asked == 5 and teacher.dim == 3


def test_a_flipped_image_is_another_view(images):
    inner = CountingTeacher()
    teacher = CachedTeacher(inner)
    flipped = images.flip(-1)
    for _ in range(2):
        assert torch.equal(
            teacher.extract_features(torch.cat((images, flipped))),
            CountingTeacher().extract_features(torch.cat((images, flipped))).half().float(),
        )
    assert inner.num_asked == 10


def test_features_take_two_bytes_a_value_in_main_memory(images):
    teacher = CachedTeacher(CountingTeacher())
    features = teacher.extract_features(images)
    assert features.dtype == torch.float32
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in teacher.features.values()
    }
    assert len(teacher.features) == 5 and sum(storages.values()) == 5 * 4 * 3 * 2


def test_images_of_floats_are_told_apart_too(images):
    inner = CountingTeacher()
    teacher = CachedTeacher(inner)
    for dtype in (torch.float32, torch.bfloat16):
        teacher.extract_features(images.to(dtype))
        teacher.extract_features(images.to(dtype))
    assert inner.num_asked == 10
