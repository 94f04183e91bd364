"""Stage 8: the kernels' own tests, a process per file, as far as the time goes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stages.common import ROOT, Stage

_REHEARSED = ("test_quant.py",)


def run(stage: Stage) -> None:
    """All files at once: most of their time goes into compiling, which uses one core each."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    chosen = [path for path in files if not stage.rehearse or path.name in _REHEARSED]
    left = [path for path in chosen if stage.get(path.name) is None]
    with tempfile.TemporaryDirectory() as folder:
        running = {path.name: _started(path, Path(folder)) for path in left}
        try:
            while running and stage.left() > 8:
                time.sleep(0.2)
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        stage.measure(name, lambda n=name, p=process: _result(Path(folder) / n, p.returncode))
        finally:
            for process in running.values():
                process.kill()
                process.wait()
        for name in running:
            counts = _counts(Path(folder) / name)
            done = f"stopped for time after {counts['passed']} passed and {counts['failed']} failed"
            stage.failed[name] = done
            stage.put(f"{name} so far", counts)


def _started(path: Path, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", str(path), "-v", "--tb=line", "-p", "no:cacheprovider", "-x"]
    with (folder / path.name).open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=out, stderr=out, text=True
        )


def _counts(log: Path) -> dict[str, int]:
    text = log.read_text()
    return {word.lower(): len(re.findall(rf"\b{word}\b +\[", text)) for word in ("PASSED", "FAILED", "SKIPPED")}


def _result(log: Path, code: int) -> dict[str, Any]:
    if code != 0:
        raise AssertionError(f"exit code {code}: {log.read_text()[-1500:]}")
    return _counts(log)
