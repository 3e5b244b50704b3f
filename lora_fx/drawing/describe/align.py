"""Alignment of two sequences by a long common subsequence.

difflib.SequenceMatcher would do, but takes 20 seconds for 5,000 nodes of few kinds (without autojunk, which drops frequent items).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise

MAX_PAIRS = 4_000_000
"""Pairs that are compared one by one. Longer sequences without unique items are aligned at their ends alone."""

Pair = tuple[int, int]


def aligned(old: Sequence[Hashable], new: Sequence[Hashable]) -> Iterator[Pair]:
    """Yield the positions of equal items that go together, in order.

    Equal ends are taken off. Items that occur once in each sequence are anchors (patience sorting), between which the rest
    is aligned recursively; without anchors, by dynamic programming.
    """
    waiting = [(0, len(old), 0, len(new))]
    while waiting:
        start, stop, first, last = waiting.pop()
        while start < stop and first < last and old[start] == new[first]:
            yield start, first
            start, first = start + 1, first + 1
        while start < stop and first < last and old[stop - 1] == new[last - 1]:
            stop, last = stop - 1, last - 1
            yield stop, last
        if start == stop or first == last:
            continue
        anchors = _anchors(old, new, start, stop, first, last)
        if anchors:
            edges = [(start - 1, first - 1), *anchors, (stop, last)]
            yield from anchors
            waiting += [(a + 1, c, b + 1, d) for (a, b), (c, d) in pairwise(edges)]
        elif (stop - start) * (last - first) <= MAX_PAIRS:
            yield from _longest_common_subsequence(old, new, start, stop, first, last)


def _anchors(
    old: Sequence[Hashable], new: Sequence[Hashable], start: int, stop: int, first: int, last: int
) -> list[Pair]:
    """Return the longest run of items that occur once in each sequence, in the order of both."""
    mine, theirs = Counter(old[start:stop]), Counter(new[first:last])
    place = {new[index]: index for index in range(first, last) if theirs[new[index]] == 1}
    pairs = [
        (index, place[old[index]]) for index in range(start, stop) if mine[old[index]] == 1 and old[index] in place
    ]
    tails: list[int] = []  # for each length of a run so far, the smallest last position in ``new``
    ends: list[int] = []
    before: list[int] = []
    for number, (_, position) in enumerate(pairs):
        length = bisect_left(tails, position)
        before.append(ends[length - 1] if length else -1)
        tails[length:] = [position, *tails[length + 1 :]]
        ends[length:] = [number, *ends[length + 1 :]]
    found: list[Pair] = []
    number = ends[-1] if ends else -1
    while number >= 0:
        found.append(pairs[number])
        number = before[number]
    return found[::-1]


def _longest_common_subsequence(
    old: Sequence[Hashable], new: Sequence[Hashable], start: int, stop: int, first: int, last: int
) -> Iterator[Pair]:
    width = last - first
    lengths = [[0] * (width + 1)]  # of the longest common subsequence behind each pair of positions
    for index in range(stop - 1, start - 1, -1):
        below, row = lengths[-1], [0] * (width + 1)
        for column in range(width - 1, -1, -1):
            same = old[index] == new[first + column]
            row[column] = below[column + 1] + 1 if same else max(below[column], row[column + 1])
        lengths.append(row)
    lengths.reverse()
    index, column = start, 0
    while index < stop and column < width:
        if old[index] == new[first + column]:
            yield index, first + column
            index, column = index + 1, column + 1
        elif lengths[index + 1 - start][column] >= lengths[index - start][column + 1]:
            index += 1
        else:
            column += 1
