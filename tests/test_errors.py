from __future__ import annotations

import pytest

from lora_fx.errors import listed


@pytest.mark.parametrize(
    ("items", "most", "separator", "text"),
    [
        ((), 2, ", ", ""),
        (("a",), 2, ", ", "a"),
        (("a", "b"), 2, ", ", "a, b"),
        (("a", "b", "c", "d", "e"), 2, ", ", "a, b and 3 more"),
        (("a is b", "c is d", "e is f"), 2, "; ", "a is b; c is d, and 1 more"),
    ],
)
def test_a_list_names_the_first_items_and_counts_the_rest(
    items: tuple[str, ...], most: int, separator: str, text: str
) -> None:
    assert listed(items, most, separator) == text
