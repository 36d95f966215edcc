"""What people prefer: pairs of seeds, the better one first."""

from densityrl.preference.table import (
    PreferenceTable,
    Split,
    read_preferences,
    split_preferences,
    write_preferences,
)

__all__ = [
    "PreferenceTable",
    "Split",
    "read_preferences",
    "split_preferences",
    "write_preferences",
]
