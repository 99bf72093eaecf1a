"""Text encoders of Hugging Face: the text tower of a CLIP, or an encoder such as BERT or T5.

Needs the optional package `transformers` (`pip install "shine-grounding[models]"`). Weights are
read from safetensors, else by torch's reader that builds tensors alone; code that comes with a
model is never run.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from shine.config import Config, TextConfig
from shine.data.text_files import stored_tokens
from shine.data.text_store import Identity
from shine.errors import InputError
from shine.pretrained import told

_MOST_TOKENS: Final = 512  # of a text, where a model states no limit of its own
_BATCH_TOKENS: Final = 4096  # of a forward pass, padding included
_ADVICE: Final = (
    "name a model of the hub, or a folder with its configuration, weights and tokenizer"
)


@dataclass(frozen=True, slots=True)
class EncodedText:
    """The tokens of a text as a store holds them."""

    tokens: Float[np.ndarray, "token width"]
    truncated: bool  # the model reads no more of it


class ModelEncoder:
    """The last hidden state of a text model, one vector for each token that its tokenizer gives.

    The tokens that mark beginning and end are among them, those of padding never are.

    Args:
        name: a folder, or a name on the hub.
        config: how the tokens are stored.
        device: of the model.

    Raises:
        InputError: `transformers` is missing, or there is no such model or one of another kind.
    """

    def __init__(self, name: str, config: TextConfig, device: str = "cpu"):
        self._config = config
        self._device = device
        with told(f"text.model={name}", "cannot be loaded", _ADVICE):
            self._tokenizer, self._model, self._limit = _load(name)
            self._model.to(device)
            self._hidden(self._tokenizer(["a"])["input_ids"])
        self.width: int = self._model.config.hidden_size
        self.identity: Identity = {
            "encoder": "hugging_face",
            "model": config.model,
            "weights": _weights_digest(self._model, self._tokenizer),
            "max_length": self._limit,
            "width": self.width,
            "normalize": config.normalize,
            "dtype": config.dtype,
        }

    @classmethod
    def of(cls, config: Config, *, device: str = "cpu") -> "ModelEncoder":
        """The encoder that `config.text` names; see the class."""
        return cls(model_place(config), config.text, device)

    def __call__(self, text: str) -> Float[np.ndarray, "token width"]:
        """The token vectors of `text`, float32, with the numbers that a store would hold."""
        return self.encode([text])[0].tokens.astype(np.float32)

    def encode(self, texts: Sequence[str]) -> list[EncodedText]:
        """The tokens of each text, encoded in batches of about equal lengths.

        Raises:
            InputError: a text has no token, or numbers are too large for the stored type.
        """
        if not texts:
            return []
        ids = self._tokenizer([*texts], truncation=True, max_length=self._limit)["input_ids"]
        lengths = np.array([len(tokens) for tokens in ids])
        if not lengths.all():
            raise InputError(
                f"{self._config.model} has no token for {texts[int(lengths.argmin())]!r}"
            )
        vectors: list[np.ndarray] = [np.zeros((0, 0))] * len(texts)
        for batch in _batches(lengths):
            hidden = self._hidden([ids[number] for number in batch])
            for number, rows in zip(batch, hidden, strict=True):
                vectors[number] = rows[: lengths[number]]
        truncated = self._truncated(texts, lengths)
        return [
            EncodedText(stored_tokens(rows, self._config, f"the text {text!r}"), cut)
            for text, rows, cut in zip(texts, vectors, truncated, strict=True)
        ]

    @torch.inference_mode()
    def _hidden(self, ids: Sequence[Sequence[int]]) -> Float[np.ndarray, "text token width"]:
        padding = self._tokenizer.pad_token_id or 0
        rows = [torch.tensor(tokens) for tokens in ids]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        lengths = torch.tensor([len(tokens) for tokens in ids])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        found = self._model(input_ids=padded.to(self._device), attention_mask=mask.to(self._device))
        hidden: Tensor = found.last_hidden_state
        return hidden.float().numpy(force=True)

    def _truncated(self, texts: Sequence[str], lengths: np.ndarray) -> list[bool]:
        """Which texts have more tokens than the model reads."""
        full = np.flatnonzero(lengths == self._limit).tolist()
        found = [False] * len(texts)
        if full:
            whole = self._tokenizer([texts[number] for number in full], verbose=False)["input_ids"]
            for number, tokens in zip(full, whole, strict=True):
                found[number] = len(tokens) > self._limit
        return found


def model_place(config: Config) -> str:
    """The folder of a model, from anywhere, or its name on the hub."""
    folder = config.path(config.text.model)
    return str(folder.resolve()) if folder.is_dir() else config.text.model


def _load(name: str) -> tuple[Any, Any, int]:
    """Tokenizer and model of a name, and how many tokens of a text the model reads."""
    try:
        from transformers import (
            AutoConfig,
            AutoModelForTextEncoding,
            AutoTokenizer,
            CLIPTextModel,
        )
    except ImportError:
        raise InputError(
            "text.encoder=hugging_face needs the package transformers; install it with "
            'pip install "shine-grounding[models]"'
        ) from None
    with _quiet():
        kind = AutoConfig.from_pretrained(name, trust_remote_code=False)
        loader: Any = CLIPTextModel if kind.model_type == "clip" else AutoModelForTextEncoding
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, loaded = loader.from_pretrained(
            name,
            dtype=torch.float32,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    absent = sorted(key for key in loaded["missing_keys"] if "pooler" not in key)
    if absent:
        raise InputError(
            f"the model {name} lacks {len(absent)} weights of a {type(model).__name__}, the first "
            f"is {absent[0]}; set text.model to a text encoder"
        )
    if "attention_mask" not in tokenizer.model_input_names:
        raise InputError(
            f"the tokenizer of {name} does not tell padding from tokens; set text.model to a CLIP "
            f"or to an encoder such as BERT or T5"
        )
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    stated = [limit for limit in limits if limit is not None and 0 < limit < 10**6]
    return tokenizer, model.eval(), min(stated, default=_MOST_TOKENS)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars, and no report of the weights of a CLIP that its text tower leaves unread."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _weights_digest(model: nn.Module, tokenizer: Any) -> str:
    """SHA-256 of what the tokens depend on: parameters, whatever their file, and vocabulary."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        if "pooler" not in name:
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.contiguous().numpy(force=True))
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def _batches(lengths: np.ndarray) -> Iterator[list[int]]:
    """Numbers of texts, shortest first, in batches whose padded tokens are bounded."""
    batch: list[int] = []
    for number in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[number] > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
