"""Runs operations on tensors that have a shape and a type but no values, with stand-ins where
values matter.

Tensors are torch's fake ones. What a batch holds beside images stays real, because shapes follow
from it: how many positions are masked, which anchors meet an object. Where the amount of work
depends on what the network itself computes, these values stand in:

- a tensor read as numbers (`tensor.item()`, `bool(tensor)`) is 0, so that checks of values find
  nothing wrong;
- a maximum along a dimension rises evenly from 0 to below 1, and its index is 0: of the boxes' best
  overlaps with objects, a threshold of 0.6 then makes 40 % of the boxes positive;
- integers compared with a number are 0: all boxes are pooled from the finest map;
- a tensor read as an array (`tensor.numpy()`) holds such rising values too: the costs of a
  matching;
- positions selected by a mask are all of them, which is the most that there can be: NMS drops no
  box.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

INDEXING_OPS = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
"""Operations whose second argument is a list of indices, masks among them."""

COMPARISON_OPS = {
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.lt.Scalar,
    aten.le.Scalar,
    aten.gt.Scalar,
    aten.ge.Scalar,
}
"""Comparisons of a tensor with a number."""


class FakeExecutor:
    """Runs operations on fake tensors, on real ones where no fake is involved."""

    def __init__(self) -> None:
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Runs one operation: fake if it takes or makes any fake tensor, else (integers, masks)
        real."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if not fakes and (tensors or not self._creates_floats(func, args, kwargs)):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=fakes[0].dtype).item()
        if func in COMPARISON_OPS and _is_integer(args[0]):
            return func(rising_values(args[0]), *args[1:], **kwargs)
        if func in INDEXING_OPS:
            indices = [index for argument in args[1] for index in expand_mask(argument)]
            args = (args[0], indices, *args[2:])
        if len(fakes) < len(tensors):
            args, kwargs = tree_map(self.to_fake, (args, kwargs))
        try:
            with self.fake_mode:
                result = func(*args, **kwargs)
        except DynamicOutputShapeException:  # as if every position were selected
            return self.to_fake(func(*tree_map(_to_ones, args), **tree_map(_to_ones, kwargs)))
        if func is aten.max.dim:
            return tuple(map(rising_values, result))
        return result

    def _creates_floats(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        """Whether an operation on no tensor at all (zeros, arange) makes one of floats."""
        with self.fake_mode:
            result = func(*args, **kwargs)
        return isinstance(result, Tensor) and result.is_floating_point()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Returns a fake tensor on CPU."""
        with self.fake_mode:
            return torch.empty(shape, dtype=dtype, device="cpu")

    def to_fake(self, value: Any) -> Any:
        """Returns a real tensor as a fake one, everything else as it is."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        return self.empty(value.shape, value.dtype)

    def drop_image_values(self, value: Any, dtype: torch.dtype) -> Any:
        """Returns images [..., 3, H, W] as fake bytes or fake floats of `dtype`, everything else as
        it is."""
        if not isinstance(value, Tensor) or value.ndim < 3 or value.shape[-3] != 3:
            return value
        return self.empty(value.shape, dtype if value.is_floating_point() else value.dtype)


class NumpyStandIns(TorchFunctionMode):
    """While active, `.numpy()` of a fake tensor gives rising values; torch itself would refuse."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.numpy and isinstance(args[0], FakeTensor):
            return rising_values(args[0]).numpy()
        return func(*args, **(kwargs or {}))


def rising_values(tensor: Tensor) -> Tensor:
    """Returns a real tensor like `tensor`: floats rise evenly from 0 to below 1, integers are 0."""
    count = tensor.numel()
    values = torch.arange(count) / max(1, count)
    return values.to(tensor.dtype).view(tensor.shape)


def expand_mask(index: Any) -> list[Any]:
    """Returns a real mask as the positions it selects, one tensor per dimension; any other index as
    it is."""
    if not isinstance(index, Tensor) or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero(as_tuple=True))


def _is_integer(value: Any) -> bool:
    """Whether a tensor holds integers; masks do not count."""
    return not value.is_floating_point() and value.dtype != torch.bool


def _to_ones(value: Any) -> Any:
    """Returns a fake tensor as real ones, everything else as it is."""
    return torch.ones(value.shape, dtype=value.dtype) if isinstance(value, FakeTensor) else value
