"""The type checker that the import hook puts on every function of the package."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# Methods are checked one by one, and beartype reads `Self` in whole classes only.
check = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))
