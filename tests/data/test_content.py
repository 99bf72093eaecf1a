from functools import cache

import pytest

from shine.data.content import Content, read_content
from shine.language.tagging import Tagger, load_tagger


@cache
def tagger() -> Tagger:
    return load_tagger("shine")


def content(caption: str) -> Content:
    return read_content(tagger()([caption])[0])


@pytest.mark.parametrize(
    ("caption", "concepts", "pairs"),
    [
        (
            "person opens the red box slowly.",
            (("verb", "open"), ("adjective", "red"), ("noun", "box"), ("adverb", "slowly")),
            (("open", "box"),),
        ),
        (
            "a person is putting a notebook in a bag.",
            (("verb", "put"), ("noun", "notebook"), ("preposition", "in"), ("place", "bag")),
            (("put", "notebook"),),
        ),
        (
            "person drinks water and closes the door.",
            (("verb", "drink"), ("noun", "water"), ("verb", "close"), ("noun", "door")),
            (("drink", "water"), ("close", "door")),
        ),
        ("the person.", (), ()),
    ],
)
def test_concepts_have_roles_and_verbs_their_nouns(caption, concepts, pairs):
    assert content(caption) == Content(concepts, pairs)


def test_forms_of_a_word_are_one_concept():
    assert content("person opens a box.") == content("a person is opening the box.")
