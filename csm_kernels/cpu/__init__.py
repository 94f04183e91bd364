"""Native decode kernels for CPUs: products with few rows, and all of a frame in two calls.

Compiled with the package where there is a C++ compiler; :func:`why_not` says why they are not to be had. Nothing here is
imported by the rest of the package unless it is used.
"""

from csm_kernels.cpu.library import instruction_sets, why_not
from csm_kernels.cpu.native import CpuFrame, CpuStack, gemv_cpu, matrix_of, sample_cpu, streaming_bandwidth

__all__ = [
    "CpuFrame",
    "CpuStack",
    "gemv_cpu",
    "instruction_sets",
    "matrix_of",
    "sample_cpu",
    "streaming_bandwidth",
    "why_not",
]
