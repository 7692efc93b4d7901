"""Regular expressions that select convolutions by their names."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from .errors import ConversionError
from .rules import DefaultExclusion

Patterns = str | Sequence[str]


class Selection:
    """Some regular expressions, any of which may be found (``re.search``) in a name.

    Args:
        argument (str): What the patterns are called in error messages.
        patterns (str | Sequence[str]): One or several regular expressions.
        convolutions (Iterable[str]): The names of all convolutions.
        modules (Iterable[str]): The names of all modules, for error messages.

    Raises:
        ConversionError: A pattern is no regular expression, or is found in the name of no
            convolution; the message has near names.
    """

    def __init__(
        self,
        argument: str,
        patterns: Patterns,
        convolutions: Iterable[str],
        modules: Iterable[str],
    ) -> None:
        names = list(convolutions)
        self.patterns = []
        given: Iterable[Any] = patterns if isinstance(patterns, (list, tuple)) else [patterns]
        for text in given:
            try:
                pattern = re.compile(text)
            except (re.error, TypeError) as error:
                raise ConversionError(
                    f'{argument} {text!r} is not a regular expression: {error}'
                ) from error
            if not any(pattern.search(name) for name in names):
                raise ConversionError(
                    f'{argument} {text!r} matches the name of no convolution in the model; '
                    + _near(text, modules)
                )
            self.patterns.append(pattern)

    def matches(self, name: str) -> bool:
        """Whether a pattern is found in ``name``."""
        return any(pattern.search(name) for pattern in self.patterns)

    def asks_for(self, name: str, exclusion: DefaultExclusion) -> bool:
        """Whether a pattern is found in ``name`` but not in the exclusion's scope alone."""
        scope = f'{exclusion.scope}.' if exclusion.scope else ''
        return any(p.search(name) and not p.search(scope) for p in self.patterns)


def _near(pattern: str, modules: Iterable[str]) -> str:
    """What the user may have meant: names near the pattern, else the model's top-level names."""
    modules = [name for name in modules if name]
    last_parts = {name.rpartition('.')[2] for name in modules}
    near = difflib.get_close_matches(pattern, sorted({*modules, *last_parts}), n=5, cutoff=0.5)
    if near:
        return f'near names: {", ".join(near)}'
    top = [name for name in modules if '.' not in name]
    return f'the model consists of: {", ".join(top)}'
