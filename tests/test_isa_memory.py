"""Inductor's instruction-set checks are remembered between processes, and never stand in the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.cpu_vec_isa import VecISA

from csm_runtime import compiling


class FakeISA:
    """As much of an instruction set as the check asks for."""

    def __init__(self, name: str = "avx9") -> None:
        self._arch_flags = f"-m{name}"
        self._name = name

    def __str__(self) -> str:
        return self._name


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Questions that reached torch's own check, which says yes to everything but ``amx``."""
    questions: list[str] = []

    def check(self: Any, code: str) -> bool:
        questions.append(f"{self}:{code}")
        return str(self) != "amx"

    monkeypatch.setenv("CSM_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(VecISA, "check_build", check)
    return questions


def ask(name: str = "avx9", code: str = "probe") -> bool:
    with compiling.remembered_isa_checks():
        return VecISA.check_build(FakeISA(name), code)  # type: ignore[arg-type]


def test_a_second_process_does_not_ask_again(asked: list[str]) -> None:
    assert ask("avx9") is True
    assert ask("amx") is False
    assert asked == ["avx9:probe", "amx:probe"]
    assert ask("avx9") is True
    assert ask("amx") is False
    assert len(asked) == 2, "the answers were on disk"


def test_another_question_is_asked(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ask()
    ask(code="another probe")
    ask("avx10")
    assert len(asked) == 3
    monkeypatch.setattr(compiling, "processor", lambda: "another processor")
    ask()
    assert len(asked) == 4
    monkeypatch.setattr(compiling.torch, "__version__", "99.0")
    ask()
    assert len(asked) == 5


def test_torchs_check_is_put_back(asked: list[str]) -> None:
    stock = VecISA.check_build
    with compiling.remembered_isa_checks():
        assert VecISA.check_build is not stock
    assert VecISA.check_build is stock
    with pytest.raises(KeyError), compiling.remembered_isa_checks():
        raise KeyError
    assert VecISA.check_build is stock


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b"null", b'"text"'], ids=repr)
def test_a_broken_file_is_ignored_and_mended(asked: list[str], tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cache" / "isa-checks.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert ask() is True
    assert len(asked) == 1
    assert ask() is True
    assert len(asked) == 1
    assert list(json.loads(path.read_text()).values()) == [True]


def test_a_folder_that_cannot_be_written(asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CSM_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    assert ask() is True
    assert ask() is True
    assert len(asked) == 2, "nothing can be remembered, everything still works"


def test_no_half_written_file_is_left(asked: list[str], tmp_path: Path) -> None:
    ask("avx9")
    ask("amx")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["isa-checks.json"]


def test_torch_without_these_internals(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpu_vec_isa

    stock = VecISA.check_build
    monkeypatch.delattr(cpu_vec_isa, "_get_isa_dry_compile_fingerprint")
    with compiling.remembered_isa_checks():
        assert VecISA.check_build is stock


def test_where_things_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CSM_KERNELS_CACHE", os.path.join("some", "where"))
    assert compiling.cache_dir() == Path("some") / "where"
    monkeypatch.delenv("CSM_KERNELS_CACHE")
    monkeypatch.setenv("HOME", os.path.join("/", "home", "nobody"))
    assert compiling.cache_dir() == Path("/home/nobody/.cache/csm-kernels")


def test_progress_says_nothing_when_switched_off(capsys: pytest.CaptureFixture[str]) -> None:
    bar = compiling.Progress(3, "packing", enabled=False)
    bar.advance("a")
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_progress_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    bar = compiling.Progress(3, "packing", enabled=True)
    bar.advance("a")
    bar.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert "packing" in err
    assert "3 parts" in err
    assert "done" in err
