"""What HTML pages share: templates, and sentences with their altered words marked."""

from jinja2 import Environment, PackageLoader, StrictUndefined

from shine.data.annotations import normalized
from shine.language.alignment import changed_places


def environment() -> Environment:
    """Renders the templates of this package; text is escaped, a missing value is an error."""
    return Environment(
        loader=PackageLoader("shine"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def marked(query: str, text: str) -> list[tuple[str, bool]]:
    """The words of `text`, each with whether it departs from the query."""
    words = text.split()
    keys = [[normalized(word) for word in sentence.split()] for sentence in (query, text)]
    return list(zip(words, changed_places(*keys)[1], strict=True))
