"""The fused codebook decode on tensors of one's own: pack once, then one call per frame.

    python examples/depth_decode.py

On CUDA the kernels run, without it their PyTorch reference. Weights are random and small; a model's own layers, anything
with ``input_norm``, ``q``, ``k``, ``v``, ``o``, ``post_norm``, ``gate``, ``up`` and ``down``, go in just like these.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from csm_kernels import NoiseKey, SamplingParams
from csm_kernels.depth import StackShape, depth_decode, depth_logits, pack_depth

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dtype = torch.bfloat16
torch.manual_seed(0)
codebooks, vocab, backbone_width = 32, 2051, 512
shape = StackShape(layers=2, width=256, ffn=1024, heads=4, groups=2, dim=64, eps=1e-5)


def linear(rows: int, columns: int) -> SimpleNamespace:
    """A matrix without bias."""
    return SimpleNamespace(weight=torch.randn(rows, columns, dtype=dtype, device=device) / columns**0.5, bias=None)


def layer() -> SimpleNamespace:
    """One Llama layer."""
    across, kept = shape.heads * shape.dim, shape.groups * shape.dim
    ones = torch.ones(shape.width, dtype=dtype, device=device)
    return SimpleNamespace(
        input_norm=ones,
        post_norm=ones,
        q=linear(across, shape.width),
        k=linear(kept, shape.width),
        v=linear(kept, shape.width),
        o=linear(shape.width, across),
        gate=linear(shape.ffn, shape.width),
        up=linear(shape.ffn, shape.width),
        down=linear(shape.width, shape.ffn),
    )


frequencies = 10000.0 ** -(torch.arange(0, shape.dim, 2, device=device) / shape.dim)
angles = torch.outer(torch.arange(codebooks, device=device), frequencies).repeat(1, 2)
packed = pack_depth(
    [layer() for _ in range(shape.layers)],
    torch.ones(shape.width, dtype=dtype, device=device),
    angles.cos(),
    angles.sin(),
    shape,
    projection=linear(shape.width, backbone_width),
    heads=torch.randn(codebooks - 1, vocab, shape.width, dtype=dtype, device=device) / shape.width**0.5,
    embedding=torch.randn(codebooks * vocab, backbone_width, dtype=dtype, device=device),
    formats={"attention": "int8", "mlp": "int8"},
)

batch = 2
hidden = torch.randn(batch, backbone_width, device=device)
codebook0 = torch.randint(vocab, (batch,), device=device)
params = SamplingParams(
    temperature=torch.full((batch,), 0.9, device=device),
    top_k=torch.full((batch,), 50, device=device),
    top_p=torch.ones(batch, device=device),
    do_sample=torch.ones(batch, dtype=torch.bool, device=device),
)
row = torch.arange(batch, device=device)
key = NoiseKey(seed=row + 7, utterance=row, frame=torch.zeros_like(row))

codes = depth_decode(hidden, codebook0, packed, params, key)
logits = depth_logits(hidden, codes, packed)
picked = logits.log_softmax(-1).gather(-1, codes[:, 1:, None])
print(f"codes {list(codes.shape)} on {device}, first row: {codes[0, :8].tolist()} ...")
print(f"mean log-probability of what was drawn: {picked.mean():.2f}")
