"""Penalties over two gloo processes: ranks agree with each other, and with one process that has the whole batch."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import batch, net, recipe
from torch import nn
from torch.nn import functional

import niwaki
from niwaki.errors import InputError

STEPS, WORLD = 6, 2
REPLICATED = {
    "augmented_lagrangian": "relaxation: hard_concrete\npenalty: {augmented_lagrangian: {sparsity: 0.5, rate: 50}}",
    "soft_weight_sharing": "penalty: {soft_weight_sharing: {components: 3, every: 2 steps, strength: 1e-4}}",
    "learning_compression": (
        "sparsity: 0.5\nallocation: global\nschedule: {one_shot: {at: 1 run}}\n"
        "penalty: {learning_compression: {initial: 0.5, factor: 1.5, every: 2 steps}}"
    ),
    "sensitivity": "penalty: {sensitivity: {strength: 0.1, bound: 0.01}}",
}
SHARDED = {
    "reweighted_l1": "penalty: {reweighted_l1: {strength: 1e-3, every: 2 steps}}",
    "log": "penalty: {log: {strength: 0.01, apply: proximal}}",
    "threshold": "relaxation: {dynamic_threshold: {per: tensor}}\npenalty: {threshold: {strength: 0.05}}",
    "directional": "penalty: {directional: {strength: 0.05}}",
    "sparse_group_lasso": "granularity: output_channel\npenalty: {sparse_group_lasso: {strength: 0.01, apply: proximal}}",
}


def plain_net():
    model = net(dtype=torch.float64)
    model.norm = nn.Identity()  # batch statistics differ between a whole batch and its halves
    return model


def run(model, text, rank, world):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = niwaki.Sparsifier(model, recipe(text), total_steps=STEPS, seed=1).attach(optimizer)
    for step in range(STEPS):
        images, labels = batch(step, 16, dtype=torch.float64)
        part = slice(rank * 16 // world, (rank + 1) * 16 // world)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    return sparsifier


def weights(model):
    return {
        name.removeprefix("module."): getattr(p, "full_tensor", lambda p=p: p)().detach().tolist() for name, p in model.named_parameters()
    }


def worker(rank, file, results):
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    for name, text in REPLICATED.items():
        model = nn.parallel.DistributedDataParallel(plain_net())
        run(model, text, rank, WORLD)
        results[f"{name}{rank}"] = weights(model)
    for name, text in SHARDED.items():
        model = fully_shard(plain_net(), mesh=dist.init_device_mesh("cpu", (WORLD,)))
        run(model, text, rank, WORLD)
        results[f"{name}{rank}"] = weights(model)
    try:
        run(fully_shard(plain_net(), mesh=dist.init_device_mesh("cpu", (WORLD,))), "penalty: hoyer", rank, WORLD)
    except InputError as error:
        results[f"refused{rank}"] = str(error)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with mp.Manager() as manager:
        found = manager.dict()
        mp.spawn(worker, (str(tmp_path_factory.mktemp("rendezvous") / "file"), found), nprocs=WORLD)
        yield dict(found)


@pytest.mark.parametrize("name", [*REPLICATED, *SHARDED])
def test_ranks_agree_with_each_other_and_with_one_process(results, name):
    assert results[f"{name}0"] == results[f"{name}1"]
    model = plain_net()
    run(model, (REPLICATED | SHARDED)[name], 0, 1)
    plain = plain_net()
    run(plain, "penalty: {l2: {strength: 0}}", 0, 1)
    for key, value in weights(model).items():
        torch.testing.assert_close(torch.tensor(results[f"{name}0"][key]), torch.tensor(value), rtol=1e-7, atol=1e-9)
    assert any(weights(plain)[key] != value for key, value in weights(model).items())


def test_what_looks_at_whole_tensors_refuses_shards(results):
    assert results["refused0"] == results["refused1"]
    assert results["refused0"].startswith("penalty: 'hoyer' looks at whole tensors, and conv2.weight is sharded")
