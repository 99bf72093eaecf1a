"""The words of the training captions by part of speech and inflection, with counts.

Generators fill slots from here and from nowhere else, so a negative never shows the model a word
that its training captions do not have.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, Self

from shine.errors import InputError
from shine.files import write_whole
from shine.language.masking import apart
from shine.language.words import Word

Kind = tuple[str, str]  # universal part of speech and Penn tag
WordCounts = Counter[tuple[str, str, str, str]]  # part of speech, tag, form, lemma

_FORMAT: Final = "shine-vocabulary-1"


@dataclass(frozen=True, slots=True)
class Entry:
    """A word of the training captions under one part of speech and inflection."""

    form: str  # as it stands in a caption, in lower case
    lemma: str
    count: int


def count_words(captions: Iterable[Sequence[Word]]) -> WordCounts:
    """How often each word stands by itself in tagged captions.

    "Laptop" of "book/laptop" does not count: alone it may be a word that no caption has.
    """
    return Counter(
        (words[i].pos, words[i].tag, words[i].text.lower(), words[i].lemma)
        for words in captions
        for i in apart(words)
    )


class Vocabulary:
    """Every word of some captions; equal for the same captions in any order.

    Args:
        entries: the words of each kind; at most one entry per form.
    """

    def __init__(self, entries: Mapping[Kind, Iterable[Entry]]):
        self._entries = {
            kind: tuple(sorted(entries[kind], key=lambda entry: (-entry.count, entry.form)))
            for kind in sorted(entries)
        }
        self._by_form: dict[str, dict[Kind, Entry]] = {}
        for kind, found in self._entries.items():
            for entry in found:
                self._by_form.setdefault(entry.form, {})[kind] = entry

    @classmethod
    def from_counts(cls, counts: WordCounts) -> Self:
        """The vocabulary of counted words; counts of parts of a corpus may be added up before."""
        entries: dict[Kind, dict[str, Entry]] = {}
        for (pos, tag, form, lemma), count in counts.items():
            forms = entries.setdefault((pos, tag), {})
            known = forms.get(form, Entry(form, lemma, 0))
            # Capitals can give one form two lemmas; the smaller one, whatever the order.
            forms[form] = Entry(form, min(lemma, known.lemma), known.count + count)
        return cls({kind: forms.values() for kind, forms in entries.items()})

    @classmethod
    def load(cls, path: Path) -> Self:
        """The vocabulary that `save` wrote.

        Raises:
            InputError: the file is missing, no such file, or altered since.
        """
        try:
            document = json.loads(path.read_text("utf-8"))
        except OSError as error:
            raise InputError(f"cannot read vocabulary {path}: {error.strerror}") from None
        except ValueError:
            document = None
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise InputError(
                f"{path}: expected a vocabulary ({_FORMAT}), got something else; make it with "
                f"`shine negatives generate`"
            )
        try:
            entries = {
                _kind(name): [
                    Entry(str(form), str(lemma), int(count)) for form, lemma, count in rows
                ]
                for name, rows in document["words"].items()
            }
            vocabulary = cls(entries)
        except (KeyError, TypeError, ValueError, AttributeError):
            vocabulary = None
        if vocabulary is None or vocabulary.checksum != document.get("sha256"):
            raise InputError(
                f"{path}: the words do not have the checksum {document.get('sha256')}, the file "
                f"was altered; make it anew with `shine negatives generate`"
            )
        return vocabulary

    def entries(self, kind: Kind) -> tuple[Entry, ...]:
        """The words of one kind, most frequent first; none for a kind that never occurred."""
        return self._entries.get(kind, ())

    def kinds(self, form: str) -> Mapping[Kind, Entry]:
        """Under which kinds a word occurred, in any case of letters; empty if it never did."""
        return self._by_form.get(form.lower(), {})

    def __contains__(self, form: str) -> bool:
        return form.lower() in self._by_form

    def __len__(self) -> int:
        return len(self._by_form)

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the words, lemmas and counts."""
        return hashlib.sha256(_canonical(self._table())).hexdigest()

    def save(self, path: Path) -> None:
        """The vocabulary stands in `path` as JSON with its checksum; a reader never sees half."""
        document = {"format": _FORMAT, "sha256": self.checksum, "words": self._table()}
        write_whole(path, json.dumps(document, ensure_ascii=False, indent=1) + "\n")

    def _table(self) -> dict[str, list[list[str | int]]]:
        return {
            "/".join(kind): [[entry.form, entry.lemma, entry.count] for entry in entries]
            for kind, entries in self._entries.items()
        }


def _kind(name: str) -> Kind:
    pos, tag = name.split("/")
    return pos, tag


def _canonical(table: Mapping[str, object]) -> bytes:
    return json.dumps(table, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
