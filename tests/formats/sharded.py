"""What each rank of the sharded test does; a module of its own, so that a spawned process can import it."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from niwaki.errors import InputError
from niwaki.formats import container, load, save
from niwaki.masks import Masks, sparsity_of


def plain(tied: bool = True) -> nn.Module:
    """Sizes that two ranks cannot share equally: 7 rows (4 and 3), and a bias of one element (1 and none)."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False), nn.Linear(7, 1))
    if tied:
        model[2].weight = model[1].weight
    return model


def rank_main(rank: int, folder: str) -> None:
    """Save a sharded model with local masks, load it again, and check this rank's part; raises when anything is wrong."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        reference = plain()
        keep = {name: torch.rand(p.shape) < 0.5 for name, p in reference.named_parameters()}
        Masks(keep).apply_(reference)
        torch.manual_seed(0)
        model = fully_shard(plain(), mesh=mesh)
        Masks(keep).apply_(model)  # whole masks on a sharded model
        rows = {7: slice(0, 4) if rank == 0 else slice(4, 7), 1: slice(0, 1) if rank == 0 else slice(1, 1)}
        shards = Masks({name: mask[rows[mask.shape[0]]] for name, mask in keep.items()})
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.to_local(), reference.get_parameter(name)[rows[parameter.shape[0]]]), name

        if rank == 1:

            def write(*_: object) -> None:
                raise AssertionError("only the first rank writes")

            container.write = write

        path = Path(folder, "model.safetensors")
        for masks in (shards, Masks(keep)):
            save(model, path, masks=masks)
            dist.barrier()
            loaded = load(path)
            assert loaded.masks == Masks(keep)
            expected = reference.state_dict()
            assert list(loaded.tensors) == [*[name for name in expected if name != "2.weight"], "2.weight"]
            assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.tensors.items())
            assert loaded.tensors["1.weight"] is loaded.tensors["2.weight"]
            dist.barrier()

        torch.manual_seed(1)
        other = fully_shard(plain(), mesh=mesh)
        load(path, other)
        for first, second in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(first.to_local(), second.to_local())
        counts = sparsity_of(other, Masks(keep))
        assert counts == sparsity_of(other, shards)
        assert counts.masked == shards.total - shards.active
        assert counts.parameters == sum(p[rows[p.shape[0]]].numel() for p in reference.parameters())
        with pytest.raises(InputError, match=r"'0\.weight' has a mask of shape"):
            Masks({"0.weight": torch.ones(6, 5, dtype=torch.bool)}).apply_(model)
    finally:
        dist.destroy_process_group()
