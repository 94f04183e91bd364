"""The runtime that puts csm_kernels into a stock CSM. ``model = accelerate(model)`` is all most people need.

Importing this package starts no CUDA context and imports neither transformers nor torchtune.
"""

from csm_kernels import __version__
from csm_runtime.accelerate import Acceleration, accelerate
from csm_runtime.metrics import Metrics
from csm_runtime.precision import PrecisionPolicy
from csm_runtime.report import Report

__all__ = ["Acceleration", "Metrics", "PrecisionPolicy", "Report", "__version__", "accelerate"]
