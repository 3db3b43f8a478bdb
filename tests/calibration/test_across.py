"""Two processes with half of the data each find what one finds with all of it."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from calibration.problems import convolutional, cross_entropy, multilayer, watched

from niwaki.calibration import collect, recalibrate_batchnorm
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.statistics import (
    GradientBank,
    GradientSquare,
    Hessian,
    HessianDiagonal,
    HessianGradient,
    InputCovariance,
    InputGram,
    InputMean,
    InputResponses,
    InputSize,
    InputSquare,
    InputVariance,
    InputZeros,
    KroneckerFactors,
    Mean,
    OutputSensitivity,
    Relevance,
    SynapticFlow,
)

WORLD = 2
OF_INPUTS = [InputSize(), InputMean(), InputVariance(), InputZeros(), InputSquare(), InputGram(), InputCovariance(), InputResponses(7)]
REST = [
    GradientSquare(), GradientBank(5), GradientBank(None), HessianGradient(1.0), Hessian(), HessianDiagonal("exact"),
    KroneckerFactors(labels="given"), SynapticFlow(), Relevance(), OutputSensitivity(),
]  # fmt: skip
OF_ROWS = (InputResponses(7), GradientBank(5), GradientBank(None))


def parts(rank, world):
    """Batches of 3, 5, and 2, the first of them for rank 0 and the others for rank 1."""
    return lambda data: data if world == 1 else (data[:1] if rank == 0 else data[1:])


def found(rank, world):
    values = {}
    model, names, data = convolutional()
    mine = parts(rank, world)(data)
    values["inputs"] = collect(model, mine, cross_entropy, watched(model, *names), OF_INPUTS)
    recalibrate_batchnorm(model, mine)
    values["norm"] = torch.stack([model.norm.running_mean, model.norm.running_var])
    model, names, data = multilayer()
    values["rest"] = collect(model, parts(rank, world)(data), cross_entropy, watched(model, *names), REST)
    mean = Mean(window=2)
    for x, _ in [data[0], data[rank], data[2 - rank]]:
        mean.update(x.sum(0), len(x))
    mean.all_reduce()
    values["window"] = mean.value()
    return values


def of_shards(rank):
    """The root keeps its own weight gathered after the first forward pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, _, data = multilayer()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (WORLD,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    tensors = [
        replace(one, layout=Layout(("output", "input"), tuple(one.parameter.shape))) for one in watched(model, "0.weight", "2.weight")
    ]
    mine = [(data[0][0], None), (data[2 - rank][0][:2], None)]
    collect(model, mine, None, tensors, OF_INPUTS)
    with pytest.raises(InputError, match="not sharded"):
        collect(model, mine, cross_entropy, tensors, [GradientSquare()])
    return collect(model, mine, None, tensors, OF_INPUTS)


def worker(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    results[rank] = found(rank, WORLD) | {"shards": of_shards(rank)}
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with mp.get_context("spawn").Manager() as manager:
        shared = manager.dict()
        mp.spawn(worker, (str(tmp_path_factory.mktemp("rendezvous") / "file"), shared), nprocs=WORLD)
        return dict(shared)


@pytest.fixture(scope="module")
def alone():
    return found(0, 1)


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return list(value) if isinstance(value, tuple) else [value.matrix]


@pytest.mark.parametrize(("kind", "request_"), [("inputs", r) for r in OF_INPUTS] + [("rest", r) for r in REST], ids=str)
def test_statistics_of_all_ranks_are_those_of_all_the_data(results, alone, kind, request_):
    for name, values in alone[kind].items():
        for one, first, second in zip(
            *(leaves(v[request_]) for v in (values, *(results[r][kind][name] for r in range(WORLD)))), strict=True
        ):
            assert torch.equal(first, second)
            if request_ == GradientBank(5):  # three of the first rank, two of the second: the first of its data
                everything = alone[kind][name][GradientBank(None)]
                one = everything[[0, 1, 2, 3, 4]]
            if request_ == InputResponses(7):  # four are asked of the first rank, which has three
                one = one[:6]
            torch.testing.assert_close(first, one, rtol=1e-12, atol=1e-13)


def test_inputs_of_sharded_weights_are_those_of_whole_ones(results):
    model, names, data = multilayer()
    everything = [(x, None) for x in (data[0][0], data[2][0], data[0][0], data[1][0][:2])]
    whole = collect(model, everything, None, watched(model, *names), OF_INPUTS[:-1])
    for name in names:
        for request in OF_INPUTS[:-1]:
            for rank in range(WORLD):
                torch.testing.assert_close(results[rank]["shards"][name][request], whole[name][request], rtol=1e-12, atol=1e-13)


def test_batch_normalization_and_windows_are_merged(results, alone):
    _, _, data = multilayer()
    both = torch.cat([data[0][0], data[2][0], data[1][0], data[1][0]])
    for rank in range(WORLD):
        torch.testing.assert_close(results[rank]["norm"], alone["norm"], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(results[rank]["window"], both.mean(0), rtol=1e-12, atol=1e-13)
