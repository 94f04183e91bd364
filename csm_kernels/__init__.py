"""Kernels for CSM, Sesame's conversational speech model: tensors in, tensors out.

Every op has a PyTorch reference, which is its specification. Importing this package imports torch alone, starts no CUDA
context and compiles nothing.
"""

from csm_kernels._version import __version__
from csm_kernels.attention import attention_step_library, attention_step_ref
from csm_kernels.embed import embed_frame_ref
from csm_kernels.gemv import gemv_library, gemv_ref, gemv_streamed
from csm_kernels.norm import rms_norm_ref
from csm_kernels.quant import QuantWeight, dequantize, quantize_int8
from csm_kernels.rope import apply_rope_ref
from csm_kernels.sampling import NoiseKey, SamplingParams, gumbel_noise_ref, sample_bisected, sample_ref
from csm_kernels.swiglu import swiglu_ref

__all__ = [
    "NoiseKey",
    "QuantWeight",
    "SamplingParams",
    "__version__",
    "apply_rope_ref",
    "attention_step_library",
    "attention_step_ref",
    "dequantize",
    "embed_frame_ref",
    "gemv_library",
    "gemv_ref",
    "gemv_streamed",
    "gumbel_noise_ref",
    "quantize_int8",
    "rms_norm_ref",
    "sample_bisected",
    "sample_ref",
    "swiglu_ref",
]
