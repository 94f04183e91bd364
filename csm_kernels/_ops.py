"""The only place that talks to torch.library.

A public op is a ``custom_op``: ``torch.compile`` keeps it whole, ``opcheck`` can test it, autograd knows its backward.
The call costs 8 us in inference mode where a raw launch costs 2 (torch 2.11), so the frame loop calls launchers. An op
that runs on tensors of every device dispatches inside: Triton kernel or reference, by ``_target.runs_triton``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "csm_kernels"


def register(
    name: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register ``csm_kernels::name`` and return the callable.

    Args:
        name: name of the op.
        implementation: tensors in, new tensors out; annotated, for the schema is read from its signature.
        fake: the same signature, on fake tensors.
        backward: ``backward(ctx, *grads)``, made of registered ops or of PyTorch ops alone.
        setup_context: ``setup_context(ctx, inputs, output)``.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", implementation, mutates_args=())
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    return op
