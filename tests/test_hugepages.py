"""Huge pages are a hint: contents stay, and whatever cannot be advised is left alone."""

from __future__ import annotations

import pytest
import torch

from csm_runtime import hugepages


def test_contents_and_addresses_stay() -> None:
    big = torch.arange(3 << 20, dtype=torch.float32)
    address, copy = big.data_ptr(), big.clone()
    done = hugepages.collapse([big, torch.ones(5)])
    # The pages at both ends reach beyond the tensor.
    assert done % (1 << 21) == 0 and done <= big.numel() * 4 + (2 << 21)
    assert big.data_ptr() == address and torch.equal(big, copy)


def test_small_and_foreign_tensors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hugepages.collapse([torch.ones(7), torch.empty(1 << 23, device="meta")]) == 0
    monkeypatch.setattr(hugepages.sys, "platform", "win32")
    assert hugepages.collapse([torch.ones(3 << 20)]) == 0
