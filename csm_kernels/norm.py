"""RMSNorm: the specification.

A Triton kernel joins this file with the decode kernels; until then the reference is what runs, under
``torch.compile`` on a CPU and inside a CUDA graph on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension, in fp32.

    Args:
        x: ``[..., D]``, any float dtype; read as fp32.
        weight: ``[D]``, any float dtype.
        eps: added to the mean square, as the stock models do.

    Returns:
        ``[..., D]`` fp32.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (2019); ``CsmRMSNorm`` of transformers, whose
    product with the weight happens in the model's dtype and here in fp32.
    """
    x = x.float()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight.float()
