"""Models of Hugging Face ``transformers`` for the text tasks, from local files alone: ``--model hf:PATH``.

PATH is one of

- a folder with ``config.json``, and with or without weights (``*.safetensors``) and a tokenizer. Without weights they are random.
  Without a tokenizer the task's own vocabulary is taken, and the configuration's is made as large;
- a configuration file, such as ``config.json``: random weights and the task's own vocabulary, whatever stands beside it.

Nothing is downloaded, no code of the folder is run, and no pickle is read. The model is the library's own, with the names and shapes of
its parameters, so that what is saved loads there again.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.huggingface import complaining, quiet, transformers_for
from niwaki.structured import pretrained
from niwaki.tasks.protocol import Data, Examples, Model, Task, Training
from niwaki.tasks.tokens import TextTask

FINE_TUNING = Training(epochs=3, batch_size=32, optimizer="adamw", learning_rate=5e-5, weight_decay=0.01, clip_norm=1.0, warmup=0.1)
"""How pretrained weights are trained further (Devlin et al. 2019); random ones are trained as the task's own default model is."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
_READ = frozenset({".json", ".txt", ".model", ".safetensors"})


def adapt(task: Task, path: str | Path) -> Task:
    """Return a text task with the one model ``hf:PATH`` and with the data as that model's tokenizer cuts it.

    Classification of sentences is done by the architecture's model for sequence classification; its inputs are ``(input_ids,
    attention_mask)``, or ``input_ids`` alone for causal models that do not take the mask as their second argument (they never see the
    padding, which comes last). Language modelling is done by its causal language model; inputs are ``input_ids``, without special
    tokens, and with a tokenizer of the folder all metrics are by its tokens.

    Raises:
        InputError: ``transformers`` is not installed, the task is not on text, or the files are no model for it.
    """
    name = f"hf:{path}"
    if not isinstance(task, TextTask):
        raise InputError(f"--model {name}: the task {task.name!r} is not on text; built-in tasks that are: characters, sentences, sst2")
    source = _Source.of(task, Path(path), name)
    metrics = task.metrics if source.tokenizer is None else task.token_metrics or task.metrics
    return Task(
        name=task.name,
        summary=task.summary,
        models={name: Model(source.build, FINE_TUNING if source.weights else task.model()[1].training)},
        data=source.data,
        loss=_of_logits(task.loss),
        metrics={key: replace(metric, values=_of_logits(metric.values)) for key, metric in metrics.items()},
        logits=_logits,
        code=source.code(),
    )


def save(model: nn.Module, folder: Path, example: tuple[Any, ...], name: str) -> None:
    """Write a model that became smaller into a folder that the library, or ``hf:FOLDER``, loads, with the tokenizer that it came with.

    Args:
        model: as the task ``adapt`` returned built it.
        folder: to be written.
        example: of its inputs, on which the loaded model is compared.
        name: of the model, ``hf:PATH`` for one that came from there.

    Raises:
        InputError: no configuration says its sizes; nothing is written.
    """
    transformers, (kind, _, path) = transformers_for(f"--model {name}"), name.partition(":")
    with quiet(transformers):
        pretrained.save(model, folder, example)
        if kind == "hf" and _has_tokenizer(source := Path(path)):
            transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False).save_pretrained(folder)


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer of the library as Niwaki's tasks use one."""

    tokenizer: Any
    size: int
    padding: int

    def __call__(self, texts: Sequence[str], length: int | None) -> Sequence[Sequence[int]]:
        sentences = length is not None
        found = self.tokenizer(list(texts), add_special_tokens=sentences, truncation=sentences, max_length=length, verbose=False)
        tokens: Sequence[Sequence[int]] = found["input_ids"]
        return tokens


@dataclass(frozen=True)
class _Source:
    """The files of a model, read as far as they can be without data."""

    name: str
    task: TextTask
    path: Path
    config: Any
    """The configuration; not to be changed."""
    model_class: type[nn.Module]
    tokenizer: _Tokenizer | None
    weights: bool

    @classmethod
    def of(cls, task: TextTask, path: Path, name: str) -> _Source:
        whole = path.is_dir()
        if not (path / "config.json" if whole else path).is_file():
            raise InputError(f"--model {name}: expected a local folder with a config.json, or such a file; nothing is downloaded")
        transformers = transformers_for(f"--model {name}")
        with quiet(transformers), complaining(f"--model {name}", "its configuration cannot be read"):
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        language = task.kind == "language_model"
        classes = transformers.MODEL_FOR_CAUSAL_LM_MAPPING if language else transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        if type(config) not in classes:
            purpose = "causal language modelling" if language else "sequence classification"
            raise InputError(f"--model {name}: transformers has no model of type {config.model_type!r} for {purpose}")
        weights = whole and any((path / file).is_file() for file in _WEIGHTS)
        pickle = next((file for file in _PICKLES if (path / file).is_file()), None)
        if whole and not weights and pickle is not None:
            raise InputError(f"--model {name}: its weights are a pickle ({pickle}), which is not read; save them as model.safetensors")
        tokenizer = None
        if _has_tokenizer(path):
            with quiet(transformers), complaining(f"--model {name}", "its tokenizer cannot be read"):
                tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        return cls(name, task, path, config, classes[type(config)], None if tokenizer is None else _wrap(tokenizer), weights)

    @property
    def masked(self) -> bool:
        """Whether the model is called with an attention mask."""
        second = list(inspect.signature(self.model_class.forward).parameters)[2:3]
        return self.task.kind == "classification" and second == ["attention_mask"]

    def data(self, folder: Path | None) -> Data:
        vocabulary = self.config.get_text_config().vocab_size
        if self.tokenizer is not None and self.tokenizer.size > vocabulary:
            raise InputError(f"--model {self.name}: its tokenizer knows {self.tokenizer.size:,} tokens, its configuration {vocabulary:,}")
        limits = [getattr(self.config.get_text_config(), "max_position_embeddings", None)]
        limits += [] if self.tokenizer is None else [self.tokenizer.tokenizer.model_max_length]
        data = self.task.read(folder, self.tokenizer, min((limit for limit in limits if limit is not None), default=None))
        if not self.masked:
            return data
        padding = data.facts["padding"]
        return replace(data, train=_Attended(data.train, padding), test=_Attended(data.test, padding))

    def build(self, data: Data) -> nn.Module:
        transformers = transformers_for(f"--model {self.name}")
        language = self.task.kind == "language_model"
        auto = transformers.AutoModelForCausalLM if language else transformers.AutoModelForSequenceClassification
        config = self._config_for(data)
        with quiet(transformers), complaining(f"--model {self.name}", "the model cannot be built"):
            if self.weights:
                model, found = auto.from_pretrained(
                    self.path,
                    config=config,
                    dtype=torch.float32,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    ignore_mismatched_sizes=True,  # of the head; _require_weights sees to the rest
                    output_loading_info=True,
                )
                self._require_weights(model, found)
            else:
                model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        with quiet(transformers), complaining(f"--model {self.name}", "the model does not run on an example"):
            self._require_blind(model, data)
        trained: nn.Module = model.train()
        return trained

    def _config_for(self, data: Data) -> Any:
        """Return the configuration with what the data decide."""
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        config.use_cache = text.use_cache = False
        if self.tokenizer is None:
            own = data.facts["vocabulary"]
            if self.weights and text.vocab_size != own:
                raise InputError(
                    f"--model {self.name}: has weights for {text.vocab_size:,} tokens but no tokenizer, and the task's own vocabulary has"
                    f" {own:,}; put the tokenizer's files there"
                )
            config.vocab_size = text.vocab_size = own
            for part in (config, text):
                part.bos_token_id = part.eos_token_id = part.pad_token_id = None
        if self.task.kind == "classification":
            config.num_labels = len(data.classes)
            config.pad_token_id = text.pad_token_id = data.facts["padding"]
        return config

    def _require_weights(self, model: Any, found: dict[str, Any]) -> None:
        """Raise InputError when weights are missing or of another shape, except those of a new head and pooler for classification."""
        body = f"{model.base_model_prefix}."
        for kind in ("missing", "mismatched"):
            names = sorted(entry if isinstance(entry, str) else entry[0] for entry in found[f"{kind}_keys"])
            if self.task.kind == "classification":
                names = [name for name in names if name.startswith(body) and ".pooler." not in name]
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise InputError(f"--model {self.name}: its weights do not fit its configuration: {kind} {names[0]}{more}")

    def _require_blind(self, model: Any, data: Data) -> None:
        """Run the model, and require that no output depends on what it must not see: the next token, or padding.

        The gradient of such an output with respect to the embedding of such a token is then exactly zero.
        """
        inputs, _ = data.test[torch.arange(min(8, len(data.test)))]
        tokens = inputs[0] if self.masked else inputs
        embedded: list[Tensor] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
        with torch.enable_grad():
            logits = model.eval()(*inputs if self.masked else (inputs,)).logits
        hook.remove()
        if self.task.kind == "language_model":
            outputs, unseen, what = logits[:, :-1], torch.arange(tokens.shape[1]) == tokens.shape[1] - 1, "the token that it is to guess"
        else:
            outputs, unseen, what = logits, tokens == data.facts["padding"], "padding"
        if not self.masked:  # a mask is the model's own affair
            (gradient,) = torch.autograd.grad(outputs.pow(2).sum(), embedded[0])
            if gradient[unseen.expand(tokens.shape)].any():
                raise InputError(f"--model {self.name}: {type(model).__name__} of this configuration sees {what} (is_decoder may be false)")

    def code(self) -> str:
        """Return the SHA-256 of the files, and of what the task's own code is."""
        folder = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        digest = hashlib.sha256((self.task.code or "").encode())
        for file in folder:
            if file.is_file() and (file.suffix in _READ or file == self.path):
                with file.open("rb") as stream:
                    digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        return digest.hexdigest()


class _Attended:
    """Examples whose inputs are tokens, seen as examples whose inputs are (tokens, attention mask): 1 for a token, 0 for padding."""

    def __init__(self, examples: Examples, padding: int) -> None:
        self.examples, self.padding = examples, padding

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, indices: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        tokens, targets = self.examples[indices]
        return (tokens, (tokens != self.padding).to(tokens.dtype)), targets


def _has_tokenizer(path: Path) -> bool:
    return path.is_dir() and any((path / file).is_file() for file in _TOKENIZERS)


def _wrap(tokenizer: Any) -> _Tokenizer:
    """Return a tokenizer of the library as one of Niwaki's; one without a padding token pads with its end-of-text token, or else 0."""
    padding = next((number for number in (tokenizer.pad_token_id, tokenizer.eos_token_id) if number is not None), 0)
    return _Tokenizer(tokenizer, len(tokenizer), padding)


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs.logits
    return logits


def _of_logits(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda outputs, targets: function(outputs.logits, targets)
