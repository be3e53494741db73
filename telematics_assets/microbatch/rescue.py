"""Values that their bronze columns can't show, as the source spells them: JSON of one row's, for a column beside them.

Belongs here: the texts that a batch's columns leave behind, made into that column; how PostgreSQL writes far dates, and
arrays of them.
Does not belong here: which values those are (`extract.py`), files (`autoloader/rescue.py`), Dagster.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, datetime, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

#: Column of every replicated table with what its other columns can't show.
RESCUED_DATA = "_rescued_data"
RESCUED_FIELD = pa.field(
    RESCUED_DATA,
    pa.string(),
    metadata={
        "comment": "JSON: values that their columns can't show, as PostgreSQL spells them; null if there are none."
    },
)
_DAY_US = 86_400_000_000
_DAYS_OF_400_YEARS = 146_097


class Rescued:
    """Gathers the texts of one batch."""

    def __init__(self) -> None:
        """Gather nothing yet."""
        self._texts: dict[str, pa.StringArray] = {}

    def add(self, column: str, texts: pa.StringArray) -> None:
        """Keep the texts of a column, null where it shows its value; an earlier one of the same row stays."""
        before = self._texts.get(column)
        self._texts[column] = texts if before is None else pc.coalesce(before, texts)

    def column(self, rows: int) -> pa.StringArray:
        """One JSON object per row: source columns with their texts; null where nothing is rescued."""
        if not self._texts:
            return pa.nulls(rows, pa.string())
        members = []
        for name, texts in self._texts.items():
            # Most often they are few and the same: `infinity`.
            encoded = texts.dictionary_encode()
            spelled = [f",{_json(name)}:{_json(text)}" for text in encoded.dictionary.to_pylist()]
            # Arrow 26 leaves rows out that have nothing to join, if nulls are skipped.
            members.append(pc.fill_null(pa.array(spelled, pa.string()).take(encoded.indices), ""))
        body = pc.binary_join_element_wise(*members, "")
        objects = pc.binary_join_element_wise("{", pc.utf8_slice_codeunits(body, 1), "}", "")
        return pc.if_else(pc.equal(body, ""), pa.scalar(None, pa.string()), objects)


def moments(numbers: npt.NDArray[np.int32] | npt.NDArray[np.int64], kind: pa.DataType) -> list[str]:
    """How PostgreSQL writes dates and times.

    Args:
        numbers: Days or microseconds since 2000-01-01; the ends of their range are the infinities.
        kind: The Arrow type that they have.
    """
    ends = np.iinfo(numbers.dtype)
    special = {int(ends.max): "infinity", int(ends.min): "-infinity"}
    found, places = np.unique(numbers, return_inverse=True)
    texts = [special.get(number) or _moment(number, kind) for number in found.tolist()]
    return [texts[place] for place in places.tolist()]


def array_text(elements: Sequence[str | None]) -> str:
    """How PostgreSQL writes an array of numbers, dates or times in one dimension."""
    spelled = ["NULL" if text is None else f'"{text}"' if " " in text else text for text in elements]
    return f"{{{','.join(spelled)}}}"


def _moment(number: int, kind: pa.DataType) -> str:
    days, rest = (number, 0) if pa.types.is_date32(kind) else divmod(number, _DAY_US)
    # A calendar repeats every 400 years, so that a year that Python knows stands in for any other.
    cycles, within = divmod(days, _DAYS_OF_400_YEARS)
    near = date(2000, 1, 1) + timedelta(within)
    year = near.year + 400 * cycles
    text = f"{year if year > 0 else 1 - year:04d}-{near:%m-%d}"
    if not pa.types.is_date32(kind):
        time = (datetime.min + timedelta(microseconds=rest)).time().isoformat()
        text += f" {time.rstrip('0') if '.' in time else time}"
        text += "+00" if kind.tz else ""
    return text if year > 0 else f"{text} BC"


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
