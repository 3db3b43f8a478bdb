"""Small folders of Hugging Face models, with tokenizers."""

import json

import pytest
import torch

WORDS = ("the", "old", "tree", "grows", "a", "new", "branch", "and", "gardener", "cuts", "it", "back", "slowly", "every", "spring")

SIZE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "llama": ("LlamaForCausalLM", {**SIZE, **TOKENS, "num_key_value_heads": 1, "max_position_embeddings": 64}),
    "bert": ("BertModel", {**SIZE, "max_position_embeddings": 64}),
    "t5": ("T5ForConditionalGeneration", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 32}),
}


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(0)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (600,), generator=generator).tolist())


@pytest.fixture
def folder(tmp_path):
    """A function that writes the folder of a model with random weights, and returns it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")

    def written(name="llama", dtype=torch.float32, shard=None, **changes):
        kind, settings = MODELS[name]
        path = tmp_path / name
        model_class = getattr(transformers, kind)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings, **changes)).to(dtype)
        model.save_pretrained(path, **({} if shard is None else {"max_shard_size": shard}))
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        if name == "bert":
            inner.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
        (path / "README.md").write_text("what it is\n")
        (path / "1_Pooling").mkdir()
        (path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling": "mean"}))
        (path / ".git").mkdir()
        (path / ".git" / "HEAD").write_text("ref\n")
        return path

    return written
