"""What this machine has, what ``accelerate()`` would use of it, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from csm_kernels import cpu

INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "asimddp", "bf16", "sve")
"""Those that matter for matrix-vector products, as Linux names them."""

PACKAGES = (
    "torch",
    "triton",
    "torchaudio",
    "transformers",
    "numpy",
    "soundfile",
    "matplotlib",
    "tqdm",
    "rich",
    "psutil",
    "prometheus-client",
    "nvidia-ml-py",
    "torchtune",
)


@dataclass(frozen=True)
class Missing:
    """Something that is not there, what it is for, and the command that gets it."""

    what: str
    purpose: str
    command: str


@dataclass(frozen=True)
class Diagnosis:
    """The findings. ``modes`` has each device's mode and why; ``fast``: ``accelerate()`` works in a fast one."""

    machine: dict[str, Any]
    modes: dict[str, tuple[str, str]]
    missing: list[Missing]
    fast: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        m = self.machine
        lines = [
            f"system         {m['system']}, Python {m['python']}",
            f"processor      {m['cpu']}, {m['cores']} of {m['logical_cpus']} logical CPUs usable",
            f"instructions   {' '.join(m['instruction_sets']) or 'unknown'}",
            f"memory         {_gib(m['memory_bytes'])}, {_gib(m['memory_available_bytes'])} available",
            *(
                f"GPU {gpu['index']}          {gpu['name']}, {_gib(gpu['memory_bytes'])}, sm_{gpu['sm']}"
                for gpu in m["gpus"]
            ),
            *([] if m["gpus"] else ["GPU            none that torch can use"]),
            f"C++ compiler   {m['compiler'] or 'none'}",
            f"native kernels {' '.join(m['native']['instruction_sets']) or 'none'}",
            f"Python headers {'found' if m['python_headers'] else 'none'}",
            "packages       " + ", ".join(f"{name} {version or 'missing'}" for name, version in m["packages"].items()),
            *(f"on {device:<11} mode {mode!r}: {why}" for device, (mode, why) in self.modes.items()),
        ]
        lines += [f"missing        {lack.what}, for {lack.purpose}: {lack.command}" for lack in self.missing]
        verdict = "accelerate() can run fast here" if self.fast else "accelerate() cannot run in a fast mode here"
        return "\n".join([*lines, verdict])


def machine() -> dict[str, Any]:
    """Facts about this machine as plain data; what cannot be found out is None."""
    total, available = _memory()
    flags = _cpu_flags()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "logical_cpus": os.cpu_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory_bytes": total,
        "memory_available_bytes": available,
        "gpus": _gpus(),
        "compiler": _compiler(),
        "native": {"missing": cpu.why_not(), "instruction_sets": list(cpu.instruction_sets())},
        "python_headers": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def diagnose() -> Diagnosis:
    """Look at the machine and decide, as ``accelerate()`` does, how frames would run on each device."""
    facts = machine()
    modes = {"cpu": _cpu_mode(facts)}
    if facts["gpus"]:
        modes["cuda"] = ("graph", "one CUDA graph per frame")
    if torch.backends.mps.is_available():
        modes["mps"] = ("eager", "nothing is compiled for MPS")
    has_model = facts["packages"]["transformers"] is not None
    fast = has_model and any(mode != "eager" for mode, _ in modes.values())
    return Diagnosis(facts, modes, _missing(facts), fast)


def _cpu_mode(facts: dict[str, Any]) -> tuple[str, str]:
    if facts["native"]["missing"] is None:
        return "native", f"native kernels for {facts['native']['instruction_sets'][0]}"
    if not facts["compiler"]:
        return "eager", "torch.compile needs a C++ compiler"
    if not facts["python_headers"]:
        return "eager", "torch.compile needs Python's C headers"
    return "compile", f"torch.compile with {facts['compiler']}"


def _missing(facts: dict[str, Any]) -> list[Missing]:
    found = []
    if facts["native"]["missing"] is not None:
        how = "install g++, then: pip install --force-reinstall --no-deps csm-kernels"
        found.append(Missing("the native CPU kernels", f"mode 'native' ({facts['native']['missing']})", how))
    if not facts["compiler"]:
        found.append(
            Missing("a C++ compiler", "compiled steps on the CPU", _system_command("g++", "xcode-select --install"))
        )
    if not facts["python_headers"]:
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        found.append(
            Missing(
                "Python's C headers",
                "compiled steps on the CPU",
                _system_command(package, "install Python from python.org"),
            )
        )
    packages = facts["packages"]
    if packages["transformers"] is None:
        found.append(Missing("transformers", "the stock model", 'pip install "csm-kernels[hf]"'))
    extras = [name for name in ("soundfile", "matplotlib", "tqdm", "rich", "psutil") if packages[name] is None]
    if extras:
        found.append(Missing(", ".join(extras), "the command line", 'pip install "csm-kernels[cli]"'))
    if shutil.which("nvidia-smi") and not facts["gpus"]:
        found.append(Missing("a torch that sees the NVIDIA GPU", "mode 'graph'", "pip install --force-reinstall torch"))
    return found


def _system_command(package: str, mac: str) -> str:
    if sys.platform == "darwin":
        return mac
    if sys.platform == "win32":
        return "winget install Microsoft.VisualStudio.2022.BuildTools"
    for tool, name in (("apt-get", package), ("dnf", {"g++": "gcc-c++"}.get(package, "python3-devel"))):
        if shutil.which(tool):
            return f"sudo {tool} install {name}"
    return f"install the package {package} of your system"


def _compiler() -> str | None:
    """Name and version of the C++ compiler torch.compile would use, None if there is none."""
    names = [os.environ.get("CXX"), *(("cl",) if sys.platform == "win32" else ("g++", "clang++", "c++"))]
    for name in filter(None, names):
        path = shutil.which(name)
        if path is None:
            continue
        try:
            told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        lines = (told.stdout or told.stderr).strip().splitlines()
        return lines[0].strip() if lines else name
    return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append({"index": index, "name": p.name, "memory_bytes": p.total_memory, "sm": f"{p.major}{p.minor}"})
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _proc(path: str) -> list[tuple[str, str]]:
    """Lines ``key: value`` of a file in /proc; nothing where there is no such file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    pairs = [line.partition(":") for line in lines if ":" in line]
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def _cpu_name() -> str:
    names = [value for key, value in _proc("/proc/cpuinfo") if key == "model name"]
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return {flag for key, value in _proc("/proc/cpuinfo") if key in ("flags", "Features") for flag in value.split()}


def _memory() -> tuple[int | None, int | None]:
    """Total and available bytes."""
    try:
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    except ImportError:
        sizes = {key: int(value.split()[0]) * 1024 for key, value in _proc("/proc/meminfo") if value.endswith("kB")}
        return sizes.get("MemTotal"), sizes.get("MemAvailable")


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"
