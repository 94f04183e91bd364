"""Kernels for CSM, Sesame's conversational speech model: tensors in, tensors out.

Every op has a file with its kernel, its launcher and its PyTorch reference, which is the specification and what runs
where Triton does not: ``csm_kernels.norm.rms_norm_ref`` and so on. Importing this package imports torch and, where it is
installed, Triton; it starts no CUDA context and compiles nothing.
"""

from csm_kernels._version import __version__
from csm_kernels.attention import attention_step
from csm_kernels.embed import embed_frame
from csm_kernels.frames import sample_frames
from csm_kernels.gemv import gemv, gemv_swiglu
from csm_kernels.loss import fused_codebook_linear_cross_entropy
from csm_kernels.norm import add_rms_norm, rms_norm
from csm_kernels.quant import QuantWeight, dequantize, quantize
from csm_kernels.rope import apply_rope
from csm_kernels.rvq import rvq_decode
from csm_kernels.sampling import NoiseKey, SamplingParams, sample
from csm_kernels.swiglu import swiglu

__all__ = [
    "NoiseKey",
    "QuantWeight",
    "SamplingParams",
    "__version__",
    "add_rms_norm",
    "apply_rope",
    "attention_step",
    "dequantize",
    "embed_frame",
    "fused_codebook_linear_cross_entropy",
    "gemv",
    "gemv_swiglu",
    "quantize",
    "rms_norm",
    "rvq_decode",
    "sample",
    "sample_frames",
    "swiglu",
]
