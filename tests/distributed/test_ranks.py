"""DDP and FSDP2 over two gloo processes: identical masks on all ranks, equal to those of one process with the whole batch."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import RECIPES, batch, net, pruned_are_zero, recipe
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.masks import local
from niwaki.sparsifier import hold

STEPS, WORLD = 14, 2
NEW = ["momentum", "rewiring", "soft_rewiring", "surgery", "gumbel", "selected"]
NAMES = ["gmp", "rigl", "set", "static", "top_kast", "str", "movement", "held", "gmp from masks", "rigl from masks", *NEW]
MEASURING = {
    "rising thresholds": "schedule: {threshold_ramp: {begin: 2 steps, ramp: 6 steps, end: 12 steps, every: 3 steps, share: 0.6}}",
    "adaptive": "allocation: global\nschedule: {adaptive: {every: 2 steps, end: 12 steps, gain: 0.1}}",
}
NAMES += MEASURING


def plain_net():
    model = net(dtype=torch.float64)
    model.norm = nn.Identity()  # batch statistics differ between a whole batch and its halves
    return model


def masks_of(model):
    """Half of two targets, and of a weight that is none."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: dict(model.named_parameters())[name].shape for name in ("conv1.weight", "conv2.weight", "fc1.weight")}
    return niwaki.Masks({name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()})


def run(model, name, rank, world, optimizer=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    start = None if name in {**RECIPES, **MEASURING} else masks_of(plain_net())
    if name == "held":
        sparsifier = hold(model, start).attach(optimizer)
    else:
        chosen = recipe({**RECIPES, **MEASURING}[name.removesuffix(" from masks")])
        images, labels = batch(900, 32, dtype=torch.float64)
        part = slice(32 * rank // world, 32 * (rank + 1) // world)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the first mask is chosen at the first step")
            sparsifier = niwaki.Sparsifier(
                model,
                chosen,
                masks=start,
                total_steps=STEPS,
                seed=1,
                validation=[(images[part], labels[part])],
                loss=functional.cross_entropy,
            ).attach(optimizer)
    for step in range(STEPS):
        images, labels = batch(step, 16, dtype=torch.float64)
        part = slice(rank * 16 // world, (rank + 1) * 16 // world)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[part]), labels[part]).backward()
        if name == "static" and world > 1:  # what clipping would see, after the ranks have averaged
            pruned = ~next(iter(sparsifier.masks.values()))
            gradient = sparsifier._tensors["conv2.weight"].bound.parameter.grad
            assert not local(gradient)[pruned].any()
        optimizer.step()
    return sparsifier


def ddp_worker(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    for name in NAMES:
        model = nn.parallel.DistributedDataParallel(plain_net())
        sparsifier = run(model, name, rank, WORLD)
        clean = pruned_are_zero(model.module, sparsifier.masks)
        results[f"{name}{rank}"] = (
            sparsifier.masks.hash(),
            list(sparsifier.masks),
            clean,
            [p.detach().tolist() for p in model.module.fc2.parameters()],
        )
    dist.destroy_process_group()


def fsdp_worker(rank, file, results):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in NAMES:
        model = plain_net()
        for layer in (model.conv1, model.conv2, model.fc1, model.fc2, model.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        sparsifier = run(model, name, rank, WORLD)
        whole = {}
        for target, mask in sparsifier.masks.items():
            parts = [None] * WORLD
            dist.all_gather_object(parts, mask)
            whole[target] = torch.cat(parts)
        results[f"{name}{rank}"] = (
            niwaki.Masks(whole).hash(),
            list(whole),
            True,
            [p.full_tensor().tolist() for p in model.fc2.parameters()],
        )
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def results(request, tmp_path_factory):
    worker = {"ddp": ddp_worker, "fsdp2": fsdp_worker}[request.param]
    with mp.get_context("spawn").Manager() as manager:
        shared = manager.dict()
        mp.spawn(worker, (str(tmp_path_factory.mktemp("rendezvous") / "file"), shared), nprocs=WORLD)
        return dict(shared)


@pytest.mark.parametrize("name", NAMES)
def test_ranks_agree_with_each_other_and_with_one_process(results, name):
    model = plain_net()
    sparsifier = run(model, name, 0, 1)
    assert 0.05 < sparsifier.sparsity < 0.95
    for rank in range(WORLD):
        masks, targets, clean, weights = results[f"{name}{rank}"]
        assert targets == list(sparsifier.masks)
        assert clean
        assert masks == sparsifier.masks.hash()
        for theirs, ours in zip(weights, model.fc2.parameters(), strict=True):
            torch.testing.assert_close(torch.tensor(theirs, dtype=torch.float64), ours.detach(), rtol=1e-9, atol=1e-12)


def disagreeing_worker(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    model = net(seed=rank)
    try:
        niwaki.Sparsifier(model, recipe("sparsity: 0.5"))
    except niwaki.NiwakiError as error:
        results[rank] = str(error)
    dist.destroy_process_group()


def test_ranks_that_disagree_are_told_on_every_rank(tmp_path):
    with mp.get_context("spawn").Manager() as manager:
        shared = manager.dict()
        mp.spawn(disagreeing_worker, (str(tmp_path / "file"), shared), nprocs=WORLD)
        assert "disagree on the mask of conv2.weight before step 0" in shared[0]
        assert shared[0] == shared[1]
