"""interpose: composes, comes off without a trace, copies and pickles into plain torch."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from niwaki.interpose import interpose, unreached


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_actions_compose_inside_out(model):
    x = torch.randn(3, 4)
    plain = model[0](x)
    interpose(model[0], lambda forward, x: forward(x) + 1)
    interpose(model[0], lambda forward, x: forward(x) * 2)
    torch.testing.assert_close(model[0](x), (plain + 1) * 2)


def test_an_action_may_change_inputs_and_backward(model):
    x = torch.randn(3, 4, requires_grad=True)
    interpose(model[0], lambda forward, x: forward(x * 3))
    model[0](x).sum().backward()
    expected = 3 * model[0].weight.sum(0).expand(3, 4)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_comes_off_without_a_trace_in_any_order(model, order):
    before = dict(vars(model[0]))
    handles = [interpose(model[0], lambda forward, x: forward(x) + 1), interpose(model[0], lambda forward, x: forward(x) * 2)]
    handles[order[0]].remove()
    handles[order[0]].remove()
    assert "forward" in vars(model[0])
    handles[order[1]].remove()
    assert vars(model[0]) == before


def test_keeps_a_forward_that_was_there_before(model):
    def patched(x):
        return torch.full((1,), 5.0)

    model[0].forward = patched
    handle = interpose(model[0], lambda forward, x: forward(x) + 1)
    assert model[0](torch.zeros(1)).item() == 6.0
    assert copy.deepcopy(model[0])(torch.zeros(1)).item() == 5.0
    handle.remove()
    assert vars(model[0])["forward"] is patched


def test_state_dict_class_and_parameters_are_untouched(model):
    keys, kind = list(model.state_dict()), type(model[0])
    interpose(model[0], lambda forward, x: forward(x))
    assert list(model.state_dict()) == keys
    assert type(model[0]) is kind


def test_deepcopy_is_plain_and_independent(model):
    x = torch.randn(3, 4)
    plain = model(x)
    interpose(model[0], lambda forward, x: forward(x) + 1)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), plain)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert not torch.equal(twin(x), plain)
    assert model[0].weight.abs().sum() > 0


def test_pickle_loads_where_niwaki_is_not_installed(model, tmp_path):
    interpose(model[0], lambda forward, x: forward(x) + 1)
    x = torch.ones(1, 4)
    file = tmp_path / "model.pickle"
    file.write_bytes(pickle.dumps(model))
    script = (
        "import sys, pickle, torch\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] == 'niwaki': raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"model = pickle.load(open({str(file)!r}, 'rb'))\n"
        "print(model(torch.ones(1, 4)).tolist())\n"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    plain = pickle.loads(pickle.dumps(model))
    assert eval(out) == plain(x).tolist()


def test_compiles_in_one_graph(model):
    x = torch.randn(3, 4)
    interpose(model[0], lambda forward, x: forward(x) * 2)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_names_the_modules_that_are_not_reached():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    found = unreached(model)
    assert "never calls it" in found["layers.0.self_attn.out_proj"]
    assert "fast path" in found["layers.0.linear1"]
    # The claim itself: in evaluation mode without gradients the layer does not call its children.
    called = []
    for name in ("linear1", "linear2", "self_attn"):
        interpose(getattr(model.layers[0], name), lambda forward, *a, name=name, **k: called.append(name) or forward(*a, **k))
    interpose(model.layers[0].self_attn.out_proj, lambda forward, *a: called.append("out_proj") or forward(*a))
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 8))
    assert called == []
    model.train()(torch.randn(1, 3, 8))
    assert sorted(called) == ["linear1", "linear2", "self_attn"]
