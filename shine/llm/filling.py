"""Filling slots by a language model: what it is told, and what its answer says.

A caption travels as a JSON value, never as part of an instruction, and an answer is lists of words:
whatever they are, they change slots and nothing else, and every one of them is judged.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from shine.config import NegativesConfig
from shine.data.annotations import MASK
from shine.errors import InputError
from shine.language.generators import Choices, Levels, Nothing, Refusal, Refusals
from shine.language.masking import PART, mask_levels, recompose
from shine.language.vocabulary import Vocabulary
from shine.language.wordnet import load_meanings
from shine.language.words import Word
from shine.llm.request import Answer, Request

PROMPTS: Final = Path(__file__).with_name("prompts")
# Structured output: one list of words per level.
SCHEMA: Final[Mapping[str, Any]] = {
    "type": "object",
    "properties": {
        "levels": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}
    },
    "required": ["levels"],
    "additionalProperties": False,
}
_LONGEST: Final = 4000  # characters of a caption that is sent; longer ones fall back
_CHARACTERS_PER_TOKEN: Final = 3.5  # of such prompts, for estimates
_FENCED: Final = re.compile(r"```(?:json)?\s*(.*?)\s*(?:```|$)", re.DOTALL)


@runtime_checkable
class KnownAnswers(Protocol):
    """Answers by the key of their request."""

    def get(self, key: str) -> Answer | None:
        """The answer to a request; None where there is none yet."""
        ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is told to do, by name and checksum."""

    name: str
    text: str
    checksum: str  # SHA-256


def load_prompt(name: str) -> Prompt:
    """A prompt that ships, by name, or one in a file.

    Raises:
        InputError: there is none of this name, or it cannot be read.
    """
    shipped = PROMPTS / f"{name}.md"
    path = shipped if shipped.is_file() else Path(name)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        known = ", ".join(sorted(file.stem for file in PROMPTS.glob("*.md")))
        raise InputError(
            f"negatives.llm.prompt is {name!r}; expected a text file or one of {known}"
        ) from None
    if not text:
        raise InputError(f"{path}: expected a prompt, the file is empty")
    return Prompt(path.stem, text, hashlib.sha256(text.encode()).hexdigest())


class LlmGenerator:
    """Proposes what a language model answered, and collects what it has yet to be asked.

    A caption is asked for once, all levels together, and once more with the reasons where levels
    were refused. Equal captions share an answer.

    Args:
        vocabulary: of the training captions; words of each slot are offered from it.
        config: masks, seed, model and prompt.
        tagger: name and version of the tagger, a part of every request's key.
        answers: so far.
    """

    name = "llm"

    def __init__(
        self, vocabulary: Vocabulary, config: NegativesConfig, tagger: str, answers: KnownAnswers
    ):
        self._choices = Choices(vocabulary, load_meanings(config.wordnet))
        self._config = config
        self._answers = answers
        self._agree = "a" in vocabulary and "an" in vocabulary
        self._prompt = load_prompt(config.llm.prompt)
        self._decisive = {
            "model": config.llm.model,
            "temperature": config.llm.temperature,
            "max_tokens": config.llm.max_tokens,
            "prompt": self._prompt.checksum,
            "tagger": tagger,
            "seed": config.seed,
        }
        self._used: dict[str, Answer] = {}
        self._missing: dict[str, Request] = {}

    def levels(self, words: Sequence[Word], *, qid: str) -> Levels:
        """See `Generator`."""
        return mask_levels(words, self._config.ratios, self._choices.exist, self._config.parts)

    def propose(
        self, words: Sequence[Word], levels: Levels, *, qid: str, refused: Refusals
    ) -> tuple[str | Nothing | None, ...]:
        """See `Generator`; a level of which the model has not been asked yet has no sentence."""
        spent = {level for round_ in refused[1:] for level in round_}
        wanted = [level for level in range(len(levels)) if level not in spent]
        question = self.question(words, levels)
        first = second = self._ask(question)
        silent = Nothing("the caption is too long to send" if question is None else "no answer")
        if refused and any(level in refused[0] for level in wanted):
            second = self._ask(self.question(words, levels, refused[0]))
        sentences: list[str | Nothing | None] = [None] * len(levels)
        for level in wanted:
            answer = second if refused and level in refused[0] else first
            if levels[level]:
                sentences[level] = (
                    silent if answer is None else self._sentence(words, levels, level, answer)
                )
        return tuple(sentences)

    def question(
        self, words: Sequence[Word], levels: Levels, refused: Mapping[int, Refusal] | None = None
    ) -> Request | None:
        """What the model is asked for a caption; None where it cannot be asked.

        Args:
            words: a tagged caption.
            levels: the slots of each level.
            refused: the levels of the first answer that were no good.
        """
        query = "".join(word.text + word.space for word in words)
        order = {slot: n for n, slot in enumerate(_order(levels), start=1)}
        if not order or len(query) > _LONGEST:
            return None
        payload = {
            "query": query,
            "only_listed_words": not self._config.open_vocabulary,
            "levels": [
                {"masked": _numbered(words, slots, order), "slots": [order[i] for i in slots]}
                for slots in levels
            ],
            "slots": [
                {
                    "slot": number,
                    "part": PART[words[slot].pos],
                    "inflection": words[slot].tag,
                    "original": words[slot].text,
                    "words": self._offered(words, slot, query),
                }
                for slot, number in order.items()
            ],
        }
        messages = [
            {"role": "system", "content": self._prompt.text},
            {"role": "user", "content": json.dumps(payload)},
        ]
        if refused:
            complaint = [
                {"level": level + 1, "sentence": said.sentence, "reasons": [*said.reasons]}
                for level, said in sorted(refused.items())
            ]
            messages.append({"role": "user", "content": json.dumps({"refused": complaint})})
        text = json.dumps(messages)
        decisive = json.dumps({**self._decisive, "messages": messages}, sort_keys=True)
        return Request(
            key=hashlib.sha256(decisive.encode()).hexdigest(),
            messages=text,
            prompt_tokens=int(len(text) / _CHARACTERS_PER_TOKEN),
        )

    def take_used(self) -> dict[str, Answer]:
        """The answers that proposals were made of since the last call, by key."""
        used, self._used = self._used, {}
        return used

    def take_missing(self) -> dict[str, Request]:
        """The requests that had no answer since the last call, by key."""
        missing, self._missing = self._missing, {}
        return missing

    def _ask(self, request: Request | None) -> Answer | None:
        if request is None:
            return None
        if (answer := self._answers.get(request.key)) is None:
            self._missing[request.key] = request
        else:
            self._used[request.key] = answer
        return answer

    def _sentence(
        self, words: Sequence[Word], levels: Levels, level: int, answer: Answer
    ) -> str | Nothing:
        """The caption as the answer has it; a slot that it leaves out keeps its mask."""
        if answer.problem:
            return Nothing(answer.problem)
        lists = read_words(answer.content)
        given = lists[level] if level < len(lists) else []
        slots = levels[level]
        if len(given) != len(slots):
            given = [MASK] * len(slots)
        return recompose(words, dict(zip(slots, given, strict=True)), agree=self._agree)

    def _offered(self, words: Sequence[Word], slot: int, query: str) -> list[str]:
        """A sample of the words of a slot's kind, the same for equal captions."""
        candidates = self._choices.of(words[slot])
        possible = candidates.suits(words[slot].lemma).copy()
        possible[[n for word in words for n in candidates.numbers.get(word.lemma, ())]] = False
        chosen = np.flatnonzero(possible)
        key = f"{self._config.seed}\0{query}\0{slot}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(key, digest_size=8).digest()
        drawn = np.random.default_rng(int.from_bytes(digest, "big")).permutation(chosen)
        return [candidates.entries[i].form for i in drawn[: self._config.llm.candidates]]


def read_words(content: str) -> list[list[str]]:
    """The words of each level in an answer, in lower case; none where it is not the JSON asked for.

    Fences around the JSON and text before or after it are forgiven.
    """
    fenced = _FENCED.search(content)
    for text in (content, fenced[1] if fenced else "", content[content.find("{") :]):
        try:
            value, _ = json.JSONDecoder().raw_decode(text.strip())
        except (ValueError, RecursionError):
            continue
        levels = value.get("levels") if isinstance(value, dict) else None
        if isinstance(levels, list):
            return [_strings(level) for level in levels]
    return []


def _strings(level: Any) -> list[str]:
    if not isinstance(level, list) or not all(isinstance(word, str) for word in level):
        return []
    return [word.strip().lower() for word in level]


def _order(levels: Levels) -> list[int]:
    """Every slot once, those of the lowest level first."""
    return list(dict.fromkeys(slot for slots in levels for slot in slots))


def _numbered(words: Sequence[Word], slots: Sequence[int], order: Mapping[int, int]) -> str:
    chosen = frozenset(slots)
    return "".join(
        (f"<{order[i]}>" if i in chosen else word.text) + word.space for i, word in enumerate(words)
    )
