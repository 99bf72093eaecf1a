"""The planted world's language: its words, what goes with what, and its sentences.

An `Action` is what happens in a video or what a query states of it. A `Wording` is how a sentence
puts it. The two are independent: one action has many sentences, all with the same truth.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from shine.data.annotations import MASK


class Verb(NamedTuple):
    """A verb's forms, and the property that a thing must have to be its object (None: any)."""

    present: str
    participle: str
    needs: str | None


VERBS: dict[str, Verb] = {
    "open": Verb("opens", "opening", "openable"),
    "close": Verb("closes", "closing", "openable"),
    "unpack": Verb("unpacks", "unpacking", "roomy"),
    "fill": Verb("fills", "filling", "roomy"),
    "wash": Verb("washes", "washing", "washable"),
    "dry": Verb("dries", "drying", "washable"),
    "wipe": Verb("wipes", "wiping", "hard"),
    "polish": Verb("polishes", "polishing", "hard"),
    "paint": Verb("paints", "painting", "hard"),
    "fold": Verb("folds", "folding", "cloth"),
    "wear": Verb("wears", "wearing", "cloth"),
    "repair": Verb("repairs", "repairing", "device"),
    "unplug": Verb("unplugs", "unplugging", "device"),
    "throw": Verb("throws", "throwing", "light"),
    "catch": Verb("catches", "catching", "light"),
    "shake": Verb("shakes", "shaking", "light"),
    "lift": Verb("lifts", "lifting", None),
    "drop": Verb("drops", "dropping", None),
    "carry": Verb("carries", "carrying", None),
    "hold": Verb("holds", "holding", None),
    "push": Verb("pushes", "pushing", None),
    "pull": Verb("pulls", "pulling", None),
    "hide": Verb("hides", "hiding", None),
    "find": Verb("finds", "finding", None),
    "inspect": Verb("inspects", "inspecting", None),
    "wrap": Verb("wraps", "wrapping", None),
}

# Things that an action is done to, with their properties.
NOUNS: dict[str, frozenset[str]] = {
    noun: frozenset(properties.split())
    for noun, properties in {
        "backpack": "openable roomy washable",
        "ball": "light washable",
        "basket": "roomy hard",
        "blanket": "cloth washable",
        "book": "openable light",
        "bottle": "openable roomy washable light",
        "bowl": "roomy washable hard",
        "box": "openable roomy hard",
        "bucket": "roomy washable hard",
        "camera": "device hard",
        "clock": "device hard",
        "cup": "roomy washable light hard",
        "hat": "cloth washable light",
        "jacket": "cloth washable openable",
        "jar": "openable roomy washable",
        "lamp": "device hard",
        "laptop": "device openable hard",
        "mirror": "hard washable",
        "pan": "washable hard",
        "phone": "device light hard",
        "pillow": "light washable",
        "plate": "washable hard light",
        "radio": "device hard",
        "scarf": "cloth washable light",
        "shirt": "cloth washable",
        "shoe": "washable light",
        "suitcase": "openable roomy hard",
        "toaster": "device hard",
        "towel": "cloth washable light",
        "umbrella": "openable light",
        "vase": "roomy hard washable",
        "wallet": "openable light",
    }.items()
}

ADJECTIVES = (
    *("black", "blue", "green", "heavy", "large", "old", "red", "small", "striped", "wooden"),
)
PREPOSITIONS = ("against", "behind", "beside", "near", "on", "under")
# Second nouns, after a preposition. Nothing is done to them, so the two roles never collide.
PLACES = (
    *("bed", "cabinet", "desk", "door", "fridge", "shelf", "sink", "sofa", "stove", "table"),
    *("wardrobe", "window"),
)
ADVERBS = ("calmly", "carefully", "eagerly", "gently", "lazily", "quickly", "quietly", "slowly")

NEUTRAL_SUBJECTS = ("person", "a person", "the person", "someone")
MAN_SUBJECTS = ("a man", "the man")
WOMAN_SUBJECTS = ("a woman", "the woman")
FORMS = ("present", "progressive", "participle")  # opens, is opening, opening
ARTICLES = ("a", "the")


@dataclass(frozen=True, slots=True)
class Action:
    """What is done, to what, and how: one concept per role, None where nothing is said."""

    verb: str
    noun: str
    adjective: str | None = None
    preposition: str | None = None
    place: str | None = None
    adverb: str | None = None

    @property
    def pair(self) -> tuple[str, str]:
        """Verb and noun."""
        return self.verb, self.noun

    def concepts(self) -> dict[str, str]:
        """Role -> concept, of the roles that are filled."""
        return {role: word for role in ROLES if (word := getattr(self, role)) is not None}

    def true_of(self, other: "Action") -> bool:
        """Whether everything that this action states holds for `other`."""
        return all(getattr(other, role) == word for role, word in self.concepts().items())

    def modifiers(self) -> tuple[tuple[str, ...], ...]:
        """The filled modifiers; preposition and place stand or fall together."""
        return tuple(group for group in MODIFIERS if getattr(self, group[0]) is not None)

    def keep(self, groups: Collection[tuple[str, ...]]) -> "Action":
        """The same verb and noun with the modifiers in `groups` alone."""
        dropped = [role for group in MODIFIERS if group not in groups for role in group]
        return replace(self, **dict.fromkeys(dropped))


ROLES = tuple(field.name for field in fields(Action))
MODIFIERS = (("adjective",), ("preposition", "place"), ("adverb",))


@dataclass(frozen=True, slots=True)
class Wording:
    """How a sentence puts an action."""

    subject: str
    form: str  # one of FORMS
    articles: tuple[str, str]  # of the noun and of the place
    adverb_first: bool  # "slowly opens the box" or "opens the box slowly"


def sentence(action: Action, wording: Wording, masked: Collection[str] = ()) -> str:
    """The sentence for `action`, lower case with a full stop; the roles in `masked` are masked."""
    words = [MASK if role in masked else word for role, word in _words(action, wording)]
    return " ".join(words) + "."


def _words(action: Action, wording: Wording) -> Iterator[tuple[str, str]]:
    """Role and word, in order; function words have an empty role."""
    adverb = [("adverb", action.adverb)] if action.adverb is not None else []
    verb = VERBS[action.verb]
    for word in wording.subject.split():
        yield "", word
    if wording.form == "progressive":
        yield "", "is"
    if wording.adverb_first:
        yield from adverb
    yield "verb", verb.present if wording.form == "present" else verb.participle
    yield "", _article(wording.articles[0], action.adjective or action.noun)
    if action.adjective is not None:
        yield "adjective", action.adjective
    yield "noun", action.noun
    if action.preposition is not None and action.place is not None:
        yield "preposition", action.preposition
        yield "", _article(wording.articles[1], action.place)
        yield "place", action.place
    if not wording.adverb_first:
        yield from adverb


def _article(article: str, word: str) -> str:
    return "an" if article == "a" and word[0] in "aeiou" else article


def afforded(verb: str) -> list[str]:
    """The nouns that `verb` can sensibly be done to, sorted."""
    needs = VERBS[verb].needs
    return sorted(noun for noun, has in NOUNS.items() if needs is None or needs in has)


def lexicon() -> dict[str, list[tuple[str, str]]]:
    """Role -> (concept, surface form) of every content word that a sentence can contain.

    Bare verbs are included: a word table must answer for `open` where a tagger gives the lemma.
    """
    forms = [(lemma, form) for lemma, verb in VERBS.items() for form in (lemma, *verb[:2])]
    plain = {
        "noun": tuple(NOUNS),
        "adjective": ADJECTIVES,
        "preposition": PREPOSITIONS,
        "place": PLACES,
        "adverb": ADVERBS,
    }
    return {"verb": forms} | {role: [(w, w) for w in words] for role, words in plain.items()}


def function_words() -> list[str]:
    """Every word of the grammar without a concept, sorted."""
    subjects = " ".join((*NEUTRAL_SUBJECTS, *MAN_SUBJECTS, *WOMAN_SUBJECTS)).split()
    return sorted({*subjects, *ARTICLES, "an", "is"})
