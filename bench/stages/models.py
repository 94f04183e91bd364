"""CSM-1B's shapes with random weights, packed for the fused kernels, and single steps of them to run and to time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csm_kernels._target import interpreting
from csm_kernels.depth import PackedDepth, PackedStack, Plan, StackShape, pack_depth, pack_stack
from csm_kernels.depth.args import Pointers
from csm_kernels.depth.kernel import launch_depth, launch_stack
from csm_kernels.quant import QuantWeight
from csm_kernels.sampling import NoiseKey, SamplingParams
from csm_runtime.adapters.spec import ModelSpec, StackSpec
from csm_runtime.fused import FusedFrame, FusedWeights
from csm_runtime.kv import State

FORMATS = ("bfloat16", "int8", "fp8", "int4")
BATCHES = (1, 4, 16)
DRIVERS = ("launches", "persistent")
ZONES = ("attention", "mlp", "projection", "head")


class Size(NamedTuple):
    """Shape of a model."""

    backbone: StackShape
    depth: StackShape
    codebooks: int
    vocab: int
    capacity: int
    context: int
    """Positions that are cached when a step runs."""
    group: int


REAL = Size(
    StackShape(16, 2048, 8192, 32, 8, 64, 1e-5), StackShape(4, 1024, 8192, 8, 2, 128, 1e-5), 32, 2051, 2048, 512, 128
)
TINY = Size(StackShape(2, 48, 64, 4, 2, 16, 1e-5), StackShape(2, 32, 48, 4, 2, 16, 1e-5), 4, 35, 64, 20, 32)


class Model(NamedTuple):
    """Both stacks, packed, and what else a frame reads."""

    size: Size
    spec: ModelSpec
    weights: FusedWeights
    rest: Any
    dtype: torch.dtype


def _rotary(positions: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = torch.outer(
        torch.arange(positions, device=device).float(),
        1 / 10000 ** (torch.arange(0, dim, 2, device=device).float() / dim),
    )
    both = torch.cat([angles, angles], dim=1)
    return both.cos(), both.sin()


def build(size: Size, fmt: str, device: torch.device, *, alike: bool = False) -> Model:
    """A model with every matrix in one format; ``fmt`` a dtype's name keeps them as they are, others are beside bf16.

    Codebook 0's head and the embeddings stay in the dtype, as in the runtime's own policies. ``alike`` makes one layer
    and packs it again and again, which needs half the memory: for compiling, where values do not matter.
    """
    kept = fmt in ("float32", "bfloat16", "float16")
    dtype = getattr(torch, fmt) if kept else torch.bfloat16
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def linear(height: int, width: int, scale: float = 1.0) -> Any:
        return SimpleNamespace(weight=(normal(height, width) * (scale / width**0.5)).to(dtype), bias=None)

    def stack(shape: StackShape, positions: int) -> tuple[Any, ...]:
        across, few = shape.heads * shape.dim, shape.groups * shape.dim
        layers = [
            SimpleNamespace(
                input_norm=(1 + 0.1 * normal(shape.width)).to(dtype),
                post_norm=(1 + 0.1 * normal(shape.width)).to(dtype),
                q=linear(across, shape.width),
                k=linear(few, shape.width),
                v=linear(few, shape.width),
                o=linear(shape.width, across),
                gate=linear(shape.ffn, shape.width),
                up=linear(shape.ffn, shape.width),
                down=linear(shape.width, shape.ffn),
            )
            for _ in range(1 if alike else shape.layers)
        ] * (shape.layers if alike else 1)
        return layers, (1 + 0.1 * normal(shape.width)).to(dtype), *_rotary(positions, shape.dim, device), shape

    formats = {} if kept else dict.fromkeys(ZONES, fmt)
    both = {zone: fmt for zone, fmt in formats.items() if zone in ("attention", "mlp")}
    backbone_args = stack(size.backbone, size.capacity)
    backbone = pack_stack(*backbone_args, both, group=size.group)
    heads = normal(size.codebooks - 1, size.vocab, size.depth.width) * (2.5 / size.depth.width**0.5)
    embedding = normal(size.codebooks * size.vocab, size.backbone.width).to(dtype)
    depth = pack_depth(
        *stack(size.depth, size.codebooks),
        linear(size.depth.width, size.backbone.width),
        heads.to(dtype),
        embedding,
        formats,
        group=size.group,
    )
    rest = SimpleNamespace(
        backbone_head=linear(size.vocab, size.backbone.width, 2.5),
        backbone_embedding=embedding,
        backbone=SimpleNamespace(norm=backbone_args[1]),
    )
    spec = ModelSpec(
        _spec(size.backbone, size.capacity),
        _spec(size.depth, size.codebooks),
        size.codebooks,
        size.vocab,
        size.vocab,
    )
    return Model(size, spec, FusedWeights(backbone, depth), rest, dtype)


def _spec(shape: StackShape, positions: int) -> StackSpec:
    return StackSpec(shape.layers, shape.width, shape.ffn, shape.heads, shape.groups, shape.dim, shape.eps, positions)


class Frame:
    """A frame of the runtime on its own buffers, and its two stacks one by one.

    Args:
        model: from :func:`build`.
        batch: rows, sampled, each with a seed of its own.
        driver: ``"launches"``, ``"persistent"``, or ``"matched"``: launches with the tiles of the persistent kernels.
    """

    def __init__(self, model: Model, batch: int, driver: str) -> None:
        size, device = model.size, model.weights.depth.embedding.device
        self.model, self.batch, self.driver = model, batch, driver
        generator = torch.Generator(device).manual_seed(batch)
        self.state = State(model.spec, batch, size.capacity, model.dtype, device)
        self.state.seed.copy_(torch.arange(batch) + 5)
        for cache in (self.state.all_keys, self.state.all_values):
            cache.normal_(generator=generator)
        self.hidden = torch.randn(batch, size.backbone.width, generator=generator, device=device)
        self.token = torch.randint(size.vocab, (batch,), generator=generator, device=device)

        def full(value: Any, dtype: torch.dtype) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        self.params = SamplingParams(
            full(0.9, torch.float32), full(50, torch.int64), full(1.0, torch.float32), full(True, torch.bool)
        )
        self.key = NoiseKey(self.state.seed, self.state.utterance, self.state.frame)
        both = (self.params, self.params)
        arguments = (model.spec, model.weights, model.rest, self.state, both, self.key)
        self.whole = FusedFrame(*arguments, persistent=driver == "persistent")
        like = FusedFrame(*arguments, persistent=True) if driver == "matched" else self.whole
        self.depth_plan = self._plan(self.whole.depth_plan, like.depth_plan)
        self.stack_plan = self._plan(self.whole._stack_plan, like._stack_plan)
        if driver == "persistent" and interpreting():  # its programs run one after another: a barrier would never end
            self.whole.depth_plan, self.whole._stack_plan = self.depth_plan, self.stack_plan
        self.logits = torch.zeros(size.codebooks - 1, batch, size.vocab, device=device)
        self.depth_args: Pointers = self.whole._depth_args._replace(logits=self.logits)
        self.stack_args: Pointers = self.whole._stack_args
        self.rewind()

    def _plan(self, own: Plan, like: Plan) -> Plan:
        if self.driver == "matched":
            own = own._replace(tiles=like.tiles, warps=like.warps, sizes=own.sizes._replace(BC=like.sizes.BC))
        return own._replace(programs=1) if interpreting() else own

    @property
    def codes(self) -> Tensor:
        return self.state.codes

    @property
    def stream(self) -> Tensor:
        """The backbone's residual stream."""
        return self.stack_args.stream

    def rewind(self) -> None:
        """Stand behind the context again, with the same hidden state and codebook 0."""
        self.state.rewind(self.model.size.context)
        self.state.frame.zero_()
        self.state.allowed.zero_()
        self.state.allowed[:, : self.model.size.context] = True
        self.state.hidden.copy_(self.hidden)

    def depth(self) -> None:
        """The depth decode of one frame, every codebook's logits kept."""
        self.depth_args.token.copy_(self.token)
        launch_depth(self.depth_plan, self.depth_args, self.batch, self.batch * self.model.size.vocab)

    def stack(self) -> None:
        """The backbone's layers for one position."""
        self.stream.copy_(self.hidden)
        launch_stack(self.stack_plan, self.stack_args, self.batch)

    def frame(self) -> None:
        """What the runtime runs per frame."""
        self.whole.emit()
        self.whole.advance()

    def check_flags(self) -> None:
        """No broken logits, no barrier that timed out.

        Raises:
            AssertionError: otherwise.
        """
        assert not self.depth_args.flags.any(), "logits with NaN"
        for name, buffers in (("depth decoder", self.depth_args), ("backbone", self.stack_args)):
            assert int(buffers.sync[1]) == 0, f"a grid barrier of the {name} timed out"


def matrix_bytes(matrix: Tensor | QuantWeight) -> int:
    """Bytes of a matrix or a stack of them, scales included."""
    return matrix.bytes if isinstance(matrix, QuantWeight) else matrix.nbytes


def phase_bytes(packed: PackedStack | PackedDepth) -> dict[str, int]:
    """Weight bytes that one launch of each phase reads."""
    depth = packed if isinstance(packed, PackedDepth) else None
    stack = packed.stack if isinstance(packed, PackedDepth) else packed
    kinds = {"qkv": "qkv", "attend_project": "o", "project": "o", "gate_up": "gate_up", "down": "down"}
    found = {phase: matrix_bytes(getattr(stack, name)) // stack.shape.layers for phase, name in kinds.items()}
    if depth is not None:
        found["start"] = matrix_bytes(depth.projection)
        found["head"] = matrix_bytes(depth.heads) // (depth.codebooks - 1)
    return found


def frame_bytes(model: Model) -> dict[str, int]:
    """Weight bytes of one frame, each counted as often as it is read; the keys and values come on top."""
    per_launch, passes = phase_bytes(model.weights.depth), model.size.codebooks - 1
    layers = sum(per_launch[name] for name in ("qkv", "project", "gate_up", "down")) * model.size.depth.layers
    backbone = phase_bytes(model.weights.backbone)
    return {
        "depth": per_launch["start"] + passes * (layers + per_launch["head"]),
        "backbone": sum(backbone[name] for name in ("qkv", "project", "gate_up", "down")) * model.size.backbone.layers,
        "head": matrix_bytes(model.rest.backbone_head.weight),
    }
