"""Longest common subsequences, a row of the table in one integer.

Allison and Dix's bit-parallel table, in the form of Hyyrö (2004, "Bit-parallel LCS-length computation
revisited"). Bit j of row i is 0 where the table grows from column j to column j + 1.
"""

import collections
from collections.abc import Hashable, Sequence


def lcs_rows(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[int]:
  """Rows of the table of `first` (down) and `second` (across), one for each item of `first`."""
  places: dict[Hashable, int] = collections.defaultdict(int)
  for at, item in enumerate(second):
    places[item] |= 1 << at
  everything = (1 << len(second)) - 1
  row, rows = everything, []
  for item in first:
    hits = row & places.get(item, 0)
    row = ((row + hits) | (row - hits)) & everything
    rows.append(row)
  return rows


def lcs_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
  """Length of the longest common subsequence."""
  rows = lcs_rows(first, second)
  return len(second) - rows[-1].bit_count() if rows else 0


def lcs_items(first: Sequence[Hashable], second: Sequence[Hashable]) -> list[Hashable]:
  """One longest common subsequence, found from the ends: where both directions are as good, `second` gets shorter."""
  rows = lcs_rows(first, second)
  down, across = len(first), len(second)
  found = []
  while down and across:
    if first[down - 1] == second[across - 1]:
      found.append(first[down - 1])
      down, across = down - 1, across - 1
    elif rows[down - 1] >> (across - 1) & 1:
      across -= 1
    else:
      down -= 1
  return found[::-1]
