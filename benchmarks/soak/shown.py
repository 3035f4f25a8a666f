"""Rows of a soak in few words, for people."""

from collections.abc import Sequence

from benchmarks.table import Row


def shown(found: Sequence[Row]) -> list[Row]:
    """The rows as they are read: what, its bound, what was found, the verdict."""
    return [
        {
            "name": row["name"],
            "bound": row["bound"],
            "found": " ".join(filter(None, [_value(row), row.get("beside", "")])),
            "verdict": row["verdict"],
        }
        for row in found
    ]


def _value(row: Row) -> str:
    if "value" not in row:
        return ""
    interval = f" ({row['low']:g} to {row['high']:g})" if "low" in row else ""
    return f"{row['value']:g}{interval}"
