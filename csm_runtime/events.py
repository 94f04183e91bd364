"""One incident of the guard, with what it takes to run its checks again."""

from __future__ import annotations

import json
import math
import platform
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm_runtime.extras import need

_VERSION = 1


@dataclass(frozen=True)
class GuardEvent:
    """Why a call left its rung, at which frame, and the tensors that the verdict rests on.

    ``tensors`` are on the CPU: hidden states, codes and logits of the frames that were still kept, sampling parameters and
    noise, and, up to 64 MiB, the cached keys and values before them. No text and no sound.
    """

    kind: str
    reason: str
    frame: int
    """The first frame that was made again."""
    rung: str
    next_rung: str
    suspect: str | None
    mode: str
    policy: str
    dtype: str
    device: str
    rows: int
    findings: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)
    time: float = field(default_factory=time.time)
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    versions: dict[str, str] = field(
        default_factory=lambda: {"torch": torch.__version__, "python": platform.python_version()}
    )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, whose shapes stand for them."""
        data = {name: value for name, value in asdict(self).items() if name != "tensors"}
        data["findings"] = [{k: _in_json(v) for k, v in finding.items()} for finding in self.findings]
        return {"version": _VERSION, **data, "tensors": {name: list(t.shape) for name, t in self.tensors.items()}}

    def save(self, folder: str | Path) -> Path:
        """Write ``guard-ID.json`` and ``guard-ID.safetensors`` into a folder, which is made; returns the JSON's path.

        Raises:
            ImportError: safetensors is not installed; it comes with the extra ``hf``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"guard-{self.id}.json"
        tensors = {name: value.contiguous() for name, value in self.tensors.items()}
        need("safetensors.torch", "hf").save_file(tensors, path.with_suffix(".safetensors"))
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> GuardEvent:
        """Read an event by the path of its JSON.

        Raises:
            ValueError: it is no event of this version.
        """
        path = Path(path)
        try:
            data = json.loads(path.read_text())
            version = data.pop("version", None)
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is no incident of the guard: {error}") from error
        if version != _VERSION:
            raise ValueError(f"{path} is an incident of version {version}, wanted {_VERSION}")
        data["tensors"] = need("safetensors.torch", "hf").load_file(path.with_suffix(".safetensors"))
        return cls(**data)


def _in_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: they stand as words."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load_events(folder: str | Path) -> list[GuardEvent]:
    """All events of a folder, oldest first.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with incidents; pass the guard's events_dir")
    return sorted((GuardEvent.load(path) for path in folder.glob("guard-*.json")), key=lambda event: event.time)
