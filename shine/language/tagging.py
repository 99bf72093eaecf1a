"""Words of a caption with their parts of speech, inflections and lemmas.

The work is spaCy's. An installed English pipeline is used where there is one; otherwise the small
pipeline in the folder ``tagger`` beside this file, trained by ``tools/train_tagger.py``. That
folder has a licence of its own and may be deleted: what is left asks for an installed pipeline.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Final

import lemminflect
import spacy
from spacy.language import Language
from spacy.tokens import Doc
from spacy.util import is_package

from shine.errors import InputError
from shine.language.words import Word

SHIPPED: Final = Path(__file__).with_name("tagger")
INSTALLED: Final = tuple(f"en_core_web_{size}" for size in ("trf", "lg", "md", "sm"))
# Only these parts of a pipeline set UPOS and Penn tags; parser, entities and lemmas are not needed.
_COMPONENTS: Final = ("tok2vec", "transformer", "tagger", "morphologizer", "attribute_ruler")

# The tokeniser takes quadratic time on a run of symbols, so texts longer than any caption are cut:
# after white space, and a run without any into shorter parts.
_PIECE: Final = 1000  # characters
_RUN: Final = 200
_INFLECTED: Final = {"NOUN": "NOUN", "PROPN": "NOUN", "VERB": "VERB", "AUX": "AUX", "ADJ": "ADJ"}
# What the pipeline sees, character by character: a stand-in for what is no character, blanks for
# what nobody sees (zero width, direction of writing), plain letters for those of full width.
_INVISIBLE: Final = (0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, 0xFEFF)
_ISOLATES: Final = range(0x2066, 0x206A)
_SEEN: Final = {
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
    **dict.fromkeys((*_INVISIBLE, *_ISOLATES), " "),
    **{wide: chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)},
}
_CLASSES: Final = {"VERB": "V", "NOUN": "N", "ADJ": "J", "ADV": "R"}  # starts of their Penn tags
# (taken for, is): mistakes that one look into a dictionary corrects.
_MISTAKEN: Final = {("NOUN", "VERB"), ("VERB", "NOUN"), ("ADV", "NOUN"), ("VERB", "ADJ")}
# "A striped sofa": a participle between a determiner (its tag) and a noun says how that is.
_ATTRIBUTIVE: Final = {(tag, "NOUN") for tag in ("DT", "PRP$", "JJ")}
_TAGS: Final = {
    "VERB": ("VBZ", "VBG", "VBD", "VBN", "VB"),
    "NOUN": ("NN", "NNS"),
    "ADJ": ("JJ", "JJR", "JJS"),
    "ADV": ("RB",),
}


class Tagger:
    """Splits captions into tagged words, the same for a caption alone as among others.

    One tagger serves one thread at a time.

    Args:
        nlp: a spaCy pipeline that sets UPOS and Penn tags.
        name: what the pipeline is called in configurations and results.
    """

    nlp: Language
    name: str
    version: str  # of the pipeline, with the start of a checksum of its files: "1.0.0+3f2a91c0"

    def __init__(self, nlp: Language, name: str):
        self.nlp = nlp
        self.name = name
        self.version = f"{nlp.meta['version']}+{_checksum(nlp.path)[:8]}"

    def __call__(self, texts: Sequence[str]) -> list[tuple[Word, ...]]:
        """The words of each text; joined, ``text + space`` of its words is the text again.

        Args:
            texts: captions; empty ones, long ones and any Unicode are allowed.
        """
        pieces = [_pieces(text) for text in texts]
        # What spaCy remembers of new words is freed with the zone: memory stays level over
        # millions of captions. Only plain strings leave it.
        with self.nlp.memory_zone():
            docs = self.nlp.pipe((p.translate(_SEEN) for p in chain(*pieces)), batch_size=256)
            return [tuple(chain(*(_words(p, next(docs)) for p in parts))) for parts in pieces]


def load_tagger(name: str = "auto") -> Tagger:
    """A tagger ready for use.

    Args:
        name: "auto" for the largest installed ``en_core_web_*`` pipeline (trf, lg, md, sm), else
            the shipped one; "shine" for the shipped one; or an installed spaCy pipeline by name.

    Raises:
        InputError: the named pipeline, or with "auto" any at all, is missing.
    """
    if name == "auto":
        name = next((n for n in INSTALLED if is_package(n)), "shine")
        if name == "shine" and not (SHIPPED / "config.cfg").is_file():
            raise InputError(
                f"expected an English tagger, found neither an installed one nor {SHIPPED}; "
                "install one with `python -m spacy download en_core_web_sm`"
            )
    if name == "shine":
        if not (SHIPPED / "config.cfg").is_file():
            raise InputError(
                f"language.tagger is 'shine', but its weights are not in {SHIPPED}; reinstall, or "
                "run `python -m spacy download en_core_web_sm` and set language.tagger=auto"
            )
        return Tagger(_load(SHIPPED), name)
    if not is_package(name):
        raise InputError(
            f"language.tagger is {name!r}, expected 'auto', 'shine' or an installed spaCy "
            f"pipeline; install it with `python -m spacy download {name}`"
        )
    return Tagger(_load(name), name)


def inflected_lemma(form: str, pos: str, tag: str) -> str | None:
    """The lemma of a word that stands nowhere yet, None where it cannot have this inflection.

    Words that inflect regularly need not be known: "blorps" is the VBZ of "blorp".

    Args:
        form: the word, in any case of letters.
        pos: the universal part of speech that it should have.
        tag: the Penn tag that it should have.
    """
    form = form.lower()
    if not form.replace("-", "").isalpha():
        return None
    if pos not in _INFLECTED:
        return form
    lemmas = lemminflect.getLemma(form, upos=_INFLECTED[pos])
    return next((x for x in lemmas if form in lemminflect.getInflection(x, tag=tag)), None)


def _load(source: str | Path) -> Language:
    nlp = spacy.load(source)
    nlp.select_pipes(enable=[n for n in nlp.pipe_names if n in _COMPONENTS])
    return nlp


def _checksum(folder: str | Path | None) -> str:
    """SHA-256 of what decides the tags: every file but the documents and the meta data."""
    assert folder is not None, "a tagger comes from a folder"
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if path.suffix != ".md" and path.name not in {"LICENSE", "meta.json"}:
            digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _pieces(text: str) -> list[str]:
    """The text in pieces of at most ``_PIECE`` characters, cut after white space where it has any.

    A cut changes at most the tags of a few words around it.
    """
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        end = 1 + max(text.rfind(c, start, start + _PIECE) for c in " \n\t") or start + _RUN
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _words(text: str, doc: Doc) -> Iterator[Word]:
    """Words by their offsets, so that nothing of the text can be lost or altered."""
    tokens = [token for token in doc if not token.is_space]
    starts = [*(token.idx for token in tokens), len(text)]
    if starts[0] > 0:
        yield Word("", text[: starts[0]], "SPACE", "_SP", "")
    kinds = [_kind(token.text.lower(), token.pos_, token.tag_) for token in tokens]
    for i, token in enumerate(tokens):
        end = token.idx + len(token)
        pos, tag = kinds[i]
        form = token.text.lower()
        lemma = _lemma(form, pos, tag)
        between = 0 < i < len(tokens) - 1 and (kinds[i - 1][1], kinds[i + 1][0])
        if tag in ("VBN", "VBD") and between in _ATTRIBUTIVE:
            pos, tag, lemma = "ADJ", "JJ", form
        yield Word(text[token.idx : end], text[end : starts[i + 1]], pos, tag, lemma)


@lru_cache(maxsize=1 << 16)
def _kind(form: str, pos: str, tag: str) -> tuple[str, str]:
    """Part of speech and Penn tag, put right where a dictionary rules out what the pipeline says.

    Args:
        form: the word in lower case.
        pos: its universal part of speech according to the pipeline.
        tag: its Penn tag according to the pipeline.
    """
    if tag == "RP":  # Universal Dependencies has no particles of verbs: an adposition.
        return "ADP", tag
    if pos not in _CLASSES or not form.isalpha() or tag == "WRB":
        return pos, tag
    known = set(lemminflect.getAllLemmas(form))
    right = pos
    if form.endswith("ly") and len(form) > 4 and known <= {"ADV"}:
        right = "ADV"  # "lazily"
    elif (pos, *known) in _MISTAKEN and (pos != "NOUN" or form.endswith("s")):
        (right,) = known  # "awakens" is no noun, "entryway" no adverb
    if right == pos and tag.startswith(_CLASSES[pos]):
        return pos, tag
    fits = (t for t in _TAGS[right] if right == "ADV" or form in _inflections(form, right, t))
    return right, next(fits, _TAGS[right][0])


def _inflections(form: str, pos: str, tag: str) -> set[str]:
    """The forms with this tag of the lemmas that `form` may have."""
    lemmas = lemminflect.getLemma(form, upos=pos)
    return {found for lemma in lemmas for found in lemminflect.getInflection(lemma, tag=tag)}


@lru_cache(maxsize=1 << 16)
def _lemma(form: str, pos: str, tag: str) -> str:
    """The lemma that has this form under this tag ("left" VBD is leave, VB is left), else the form.

    Args:
        form: the word in lower case.
        pos: its universal part of speech; only words that inflect are looked up.
        tag: its Penn tag.
    """
    if pos not in _INFLECTED or not tag or not form.isalpha():
        return form
    lemmas = lemminflect.getLemma(form, upos=_INFLECTED[pos])
    exact = (x for x in lemmas if form in lemminflect.getInflection(x, tag=tag, inflect_oov=False))
    return next(chain(exact, lemmas), form).lower() or form
