"""Hugging Face models with random weights: units out, the configuration follows, and the folder loads again."""

import copy

import pytest
import torch
from structured.whole import check, masked, masks_of

from niwaki.dependency import find_groups
from niwaki.errors import InputError
from niwaki.masks import Masks
from niwaki.structured import shrink

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIZES = {"intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 20}
BERT = ("BertModel", {"hidden_size": 16, "num_attention_heads": 4, **SIZES})
GPT2 = ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 3, "n_head": 4, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0})
LLAMA = ("LlamaForCausalLM", {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, **SIZES})
T5 = ("T5EncoderModel", {"d_model": 16, "num_layers": 2, "num_heads": 4, "d_kv": 4, "d_ff": 24, "vocab_size": 20})


def build(name, options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**options)).double().eval()


def words(batch, length, seed=0):
    return {"input_ids": torch.randint(0, 20, (batch, length), generator=torch.Generator().manual_seed(seed))}


def shrunk(model, kinds, share=0.5):
    masks = masks_of(model, find_groups(model, words(1, 5)), kinds, share)
    return check(model, masks, words(1, 5), words(3, 7, seed=1))


@pytest.mark.parametrize(
    ("model", "kinds", "fields"),
    [
        (BERT, ["channel"], {"intermediate_size": 12}),
        (GPT2, ["channel"], {"n_inner": 32}),
        (LLAMA, ["channel"], {"intermediate_size": 12}),
        (LLAMA, ["head"], {"num_attention_heads": 4, "num_key_value_heads": 2}),
        (LLAMA, ["query_head"], {"num_attention_heads": 4}),
        (LLAMA, ["channel", "head", "query_head"], {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}),
        (T5, ["channel", "head"], {"d_ff": 12, "num_heads": 2}),
    ],
)
def test_a_smaller_model_is_saved_and_loaded_by_the_library(model, kinds, fields, tmp_path):
    name, options = model
    smaller = shrunk(build(name, options), kinds)
    assert {field: getattr(smaller.model.config, field) for field in fields} == fields
    assert {path: value for path, value in smaller.removed.attributes.items() if path.startswith("config")} == {
        f"config.{field}": value for field, value in fields.items()
    }
    smaller.save_pretrained(tmp_path)
    again = type(smaller.model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    x = words(2, 6, seed=5)
    assert torch.equal(again(**x)[0], smaller.model(**x)[0])
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in smaller.model.parameters())


QUERIES = [(BERT, "encoder.layer.0.attention.self.query.weight"), (GPT2, "transformer.h.0.attn.c_attn.weight")]


@pytest.mark.parametrize(("model", "tensor"), QUERIES)
def test_what_no_configuration_can_say_is_refused_and_nothing_is_written(model, tensor, tmp_path):
    smaller = shrunk(build(*model), ["head"])
    with pytest.raises(InputError) as error:
        smaller.save_pretrained(tmp_path / "folder")
    assert str(error.value).startswith(f"save_pretrained: no {type(smaller.model.config).__name__} says these sizes: {tensor} is [")
    assert "niwaki.save(model, path, removed=...)" in str(error.value)
    assert not (tmp_path / "folder").exists()


def test_layers_that_differ_are_refused_and_the_field_stays():
    model = build(*LLAMA)
    groups = find_groups(model, words(1, 5))
    masks = masks_of(model, [g for g in groups if "layers.1" in g.name], ["channel"])
    smaller = check(model, masks, words(1, 5), words(3, 7, seed=1))
    assert smaller.model.config.intermediate_size == 24
    with pytest.raises(InputError, match=r"layers.1.mlp.* is \[12, 32\], and would be \[24, 32\] .* \(allocation: uniform\)"):
        smaller.save_pretrained("unused")


@pytest.mark.parametrize(("model", "blocks", "field"), [(LLAMA, "model.layers", "num_hidden_layers"), (GPT2, "transformer.h", "n_layer")])
def test_whole_layers_go(model, blocks, field, tmp_path):
    whole = build(*model)
    gone = Masks({name: torch.zeros_like(p, dtype=torch.bool) for name, p in whole.named_parameters() if name.startswith(f"{blocks}.1.")})
    smaller = check(whole, gone, words(1, 5), words(3, 7, seed=1))
    assert smaller.removed.layers == {blocks: [0, 2]}
    assert getattr(smaller.model.config, field) == 2
    assert getattr(whole.config, field) == 3
    attentions = [module for module in smaller.model.modules() if hasattr(module, "layer_idx")]
    assert sorted({module.layer_idx for module in attentions}) == [0, 1]
    smaller.save_pretrained(tmp_path)
    again = type(whole).from_pretrained(tmp_path, dtype=torch.float64).eval()
    x = words(2, 6, seed=5)
    assert torch.equal(again(**x)[0], smaller.model(**x)[0])
    assert again.generate(**x, max_new_tokens=3, do_sample=False).shape == (2, 9)


def test_tied_weights_stay_tied():
    model = build(*GPT2)
    assert model.lm_head.weight is model.transformer.wte.weight
    smaller = shrunk(model, ["channel", "head"])
    assert smaller.model.lm_head.weight is smaller.model.transformer.wte.weight


def test_the_model_and_its_configuration_stay_as_they_were():
    model = build(*LLAMA)
    before = copy.deepcopy(model.config.to_dict())
    masks = masks_of(model, find_groups(model, words(1, 5)), ["channel", "head"])
    smaller = shrink(model, masks, words(1, 5))
    assert model.config.to_dict() == before
    torch.testing.assert_close(smaller.model(**words(2, 4))[0], masked(model, masks)(**words(2, 4))[0])


def test_other_models_are_saved_otherwise():
    smaller = shrink(torch.nn.Linear(2, 2), {}, torch.ones(1, 2))
    with pytest.raises(InputError, match="save_pretrained: Linear is no Hugging Face model"):
        smaller.save_pretrained("unused")
