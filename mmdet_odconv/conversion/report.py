"""What a conversion did, as data and as a table."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from terminaltables import AsciiTable


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`convert_to_odconv` did to a model.

    ``str(report)`` is a table of groups of convolutions, and :meth:`details` is a table with all
    names.

    Attributes:
        converted (list[str]): The names of the convolutions that are ODConv now. A convolution that
            is used at several places is listed once, under its first name.
        kept (list[tuple[str, str]]): The names of the other convolutions, each with the reason.
        parameters_before (int): Parameters of the whole model before.
        parameters_after (int): Parameters of the whole model after.
    """

    converted: list[str]
    kept: list[tuple[str, str]]
    parameters_before: int
    parameters_after: int

    def reasons(self) -> dict[str, int]:
        """How many convolutions were kept for each reason, the most frequent first."""
        return dict(Counter(reason for _, reason in self.kept).most_common())

    def details(self) -> str:
        """A table with one row for each convolution."""
        rows = [[name, 'converted'] for name in self.converted]
        rows += [[name, f'kept: {reason}'] for name, reason in self.kept]
        return f'{_table([["convolution", ""], *rows])}\n{self._parameters()}'

    def __str__(self) -> str:
        rows = [['', 'convolutions', 'names (* is any number)']]
        rows.append(['converted', str(len(self.converted)), _shortened(self.converted)])
        for reason, number in self.reasons().items():
            names = [name for name, why in self.kept if why == reason]
            rows.append([f'kept: {reason}', str(number), _shortened(names)])
        return f'{_table(rows)}\n{self._parameters()}'

    def summary(self) -> str:
        """The numbers in one line."""
        return (
            f'{len(self.converted)} convolutions converted, {len(self.kept)} kept; '
            f'{self._parameters()}'
        )

    def _parameters(self) -> str:
        before, after = self.parameters_before / 1e6, self.parameters_after / 1e6
        return f'parameters: {before:.2f} M before, {after:.2f} M after'


def _table(rows: list[list[str]]) -> str:
    table = AsciiTable(rows)
    table.inner_row_border = any('\n' in cell for row in rows for cell in row)
    return table.table


def _shortened(names: Iterable[str]) -> str:
    """The names, one a line, those that differ in numbers only on one line with their count."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r'\d+(?=\.|$)', '*', name), []).append(name)
    lines = [
        members[0] if len(members) == 1 else f'{pattern} ({len(members)})'
        for pattern, members in groups.items()
    ]
    return '\n'.join(lines)
