"""Sharded models (FSDP2): two real processes save one file, and load it."""

from pathlib import Path

import pytest
import torch
from formats.sharded import plain, rank_main

from niwaki.formats import load


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_save_and_load_one_file(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.iterdir()} <= {"model.safetensors", "rendezvous"}
    model = plain()
    masks = load(tmp_path / "model.safetensors", model).masks
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
