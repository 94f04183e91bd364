"""How a kernel walks the rows of a tensor of any strides, without a copy."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from csm_kernels._target import tl, triton


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Offset of a row, int64; the three numbers are those of :class:`Rows`."""
    row = tl.cast(row, tl.int64)
    return (row // inner) * outer_stride + (row % inner) * inner_stride


class Rows(NamedTuple):
    """Rows of the last dimension: row ``r`` starts at ``(r // inner) * outer_stride + (r % inner) * inner_stride``."""

    total: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def walk(self) -> tuple[int, int, int]:
        """What :func:`row_start` takes."""
        return self.inner, self.outer_stride, self.inner_stride


def rows_of(x: Tensor, name: str) -> Rows:
    """The rows of ``x``, read where they are.

    Args:
        x: ``[..., D]`` with unit stride in the last dimension.
        name: what an error calls it.

    Raises:
        ValueError: the last dimension is strided, or the leading ones cannot be walked with two strides.
    """
    if x.ndim == 0:
        raise ValueError(f"{name} needs at least one dimension, got a scalar")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} must have unit stride in its last dimension, got strides {tuple(x.stride())} for shape "
            f"{tuple(x.shape)}: call .contiguous() on it"
        )
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        raise ValueError(
            f"{name} with strides {tuple(x.stride())} for shape {tuple(x.shape)} cannot be walked with two strides: call "
            ".contiguous() on it"
        )
    dims = [(1, 0)] * (2 - len(dims)) + dims
    return Rows(dims[0][0] * dims[1][0], dims[1][0], dims[0][1], dims[1][1])


def walkable(grad: Tensor) -> Tensor:
    """A gradient as kernels can read it: autograd hands out expanded scalars and the like, which are copied."""
    try:
        rows_of(grad, "grad")
    except ValueError:
        return grad.contiguous()
    return grad
