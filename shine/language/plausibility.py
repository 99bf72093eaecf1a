"""How likely a sentence is among the captions of other videos.

The judge is a small recurrent network, of another kind than the counts of neighbours that fill
slots. It is cross-fitted: videos are dealt into folds, and a sentence of a video is scored by a
network that was trained without the fold of that video.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

FOLDS: Final = 3
LEAST_CAPTIONS: Final = 300  # fewer teach a network nothing
MOST_CAPTIONS: Final = 20_000  # that networks are trained on; of more, a sample
MOST_WORDS: Final = 64  # of a sentence; what follows is left out
MOST_KNOWN: Final = 8_000  # words a network tells apart; rarer ones are unknown

_UNKNOWN, _START, _END, _PADDING = range(4)
_FIRST_WORD: Final = 4
_WIDTH: Final = 96
_DROPOUT: Final = 0.3
_BATCH: Final = 64
_PASSES: Final = 6
_LEAST_STEPS: Final = 150
_RATE: Final = 4e-3
_MOST_SCORES: Final = 1 << 23  # logits of one batch when scoring


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of a sentence in nats, each given all words before."""

    words: tuple[float, ...]
    end: float  # that the sentence ends there
    known: tuple[bool, ...]  # False for words that the network never saw, or once

    @property
    def unknown(self) -> int:
        """How many words the network does not know."""
        return self.known.count(False)

    @property
    def mean(self) -> float:
        """Per word, the end counted as one."""
        return (sum(self.words) + self.end) / (len(self.words) + 1)


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption of a video, or what might be one."""

    vid: str
    words: tuple[str, ...]  # compared as they are


class CaptionModels:
    """Networks that know captions, each those of all videos but one fold.

    Equal captions and seeds give equal scores on one machine. Words that occur once teach the
    network what an unknown word is like; an unknown word gets its share of that probability, as
    one of as many words as were learned from.

    Args:
        captions: true ones; at least `LEAST_CAPTIONS`. Of more than `MOST_CAPTIONS`, those videos
            are used whose ids hash lowest.
        seed: of the folds and the training.
    """

    num_captions: int  # used for training, over all folds

    def __init__(self, captions: Iterable[Caption], *, seed: int = 0):
        self._seed = seed
        used = sorted(
            (rank(caption.vid, seed), caption.vid, caption.words) for caption in captions
        )[:MOST_CAPTIONS]
        assert len(used) >= LEAST_CAPTIONS, "too few captions to learn from"
        self.num_captions = len(used)
        with _one_thread():
            self._models = [
                _Model(
                    [words[:MOST_WORDS] for _, vid, words in used if self._fold(vid) != fold],
                    seed=seed * FOLDS + fold,
                )
                for fold in range(FOLDS)
            ]
        self._known: dict[tuple[int, tuple[str, ...]], Scores] = {}

    def __call__(self, captions: Sequence[Caption]) -> list[Scores]:
        """The scores of each sentence by the network that knows nothing of its video."""
        keys = [(self._fold(one.vid), one.words[:MOST_WORDS]) for one in captions]
        for fold, model in enumerate(self._models):
            new = sorted({key[1] for key in keys if key[0] == fold and key not in self._known})
            with _one_thread():
                scores = model.scores(new)
            self._known |= zip(((fold, words) for words in new), scores, strict=True)
        return [self._known[key] for key in keys]

    def _fold(self, vid: str) -> int:
        return rank(vid, self._seed) % FOLDS


def rank(name: str, seed: int) -> int:
    """A number that looks drawn at random and is the same wherever `name` and `seed` are."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Steps this small are slower, and their last digits less certain, on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Network(nn.Module):
    """Logits of the next word after every word."""

    def __init__(self, num_words: int):
        super().__init__()
        self.embed = nn.Embedding(num_words, _WIDTH)
        self.recur = nn.GRU(_WIDTH, _WIDTH, batch_first=True)
        self.dropout = nn.Dropout(_DROPOUT)
        self.bias = nn.Parameter(torch.zeros(num_words))
        nn.init.normal_(self.embed.weight, std=_WIDTH**-0.5)

    def forward(self, words: Int[Tensor, "sentence word"]) -> Float[Tensor, "sentence word known"]:
        hidden, _ = self.recur(self.dropout(self.embed(words)))
        return F.linear(self.dropout(hidden), self.embed.weight, self.bias)


class _Model:
    """One network and the words that it tells apart."""

    def __init__(self, sentences: Sequence[tuple[str, ...]], *, seed: int):
        counts = Counter(word for words in sentences for word in words)
        often = sorted((word for word in counts if counts[word] > 1), key=lambda w: (-counts[w], w))
        known = often[:MOST_KNOWN]
        self._numbers = {word: number for number, word in enumerate(known, start=_FIRST_WORD)}
        # One unknown word has this much less than all of them together.
        self._log_unknown = float(torch.tensor(max(len(counts) - len(known), 1)).log())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = _Network(_FIRST_WORD + len(known))
            self._train([self._encode(words) for words in sentences])

    def scores(self, sentences: Sequence[tuple[str, ...]]) -> list[Scores]:
        rows = [self._encode(words) for words in sentences]
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        found: dict[int, Scores] = {}
        size = max(1, _MOST_SCORES // (len(self._network.bias) * (MOST_WORDS + 2)))
        with torch.inference_mode():
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                given, wanted = _batch([rows[row] for row in chosen])
                logs = self._network(given).log_softmax(2)
                logs[..., _UNKNOWN] -= self._log_unknown
                picked = logs.gather(2, wanted[..., None])[..., 0].tolist()
                for row, values in zip(chosen, picked, strict=True):
                    count = len(rows[row])
                    known = tuple(number != _UNKNOWN for number in rows[row])
                    found[row] = Scores(tuple(values[:count]), values[count], known)
        return [found[row] for row in range(len(rows))]

    def _encode(self, words: Sequence[str]) -> list[int]:
        return [self._numbers.get(word, _UNKNOWN) for word in words]

    def _train(self, rows: Sequence[list[int]]) -> None:
        network = self._network.train()
        optimizer = torch.optim.Adam(network.parameters())
        steps = max(_LEAST_STEPS, _PASSES * (-(-len(rows) // _BATCH)))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=_RATE, total_steps=steps, pct_start=0.2
        )
        queue: list[int] = []
        for _ in range(steps):
            if len(queue) < _BATCH:
                queue += torch.randperm(len(rows)).tolist()
            chosen, queue = queue[:_BATCH], queue[_BATCH:]
            given, wanted = _batch([rows[row] for row in chosen])
            loss = F.cross_entropy(
                network(given).flatten(0, 1), wanted.flatten(), ignore_index=_PADDING
            )
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        network.eval()


def _batch(
    rows: Sequence[list[int]],
) -> tuple[Int[Tensor, "sentence word"], Int[Tensor, "sentence word"]]:
    """What is given and what is to follow, padded to one length."""
    longest = 1 + max(map(len, rows))
    given = torch.full((len(rows), longest), _PADDING)
    wanted = torch.full((len(rows), longest), _PADDING)
    for number, row in enumerate(rows):
        given[number, : len(row) + 1] = torch.tensor([_START, *row])
        wanted[number, : len(row) + 1] = torch.tensor([*row, _END])
    return given, wanted
