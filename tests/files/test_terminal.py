"""Tables in terminals: nothing is cut, headings stay short, and what has no room is named."""

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich import box
from rich.console import Console

from haste.files.terminal import fitted

WORD = st.text("abcdefg-", min_size=1, max_size=9).filter(lambda word: word.strip("-"))
NAME = st.lists(WORD, min_size=1, max_size=3).map(" ".join)
NUMBER = st.floats(-1e6, 1e6).map(lambda value: f"{value:.2f}")


@st.composite
def tables(draw):
    kinds = [False, *draw(st.lists(st.booleans(), min_size=1, max_size=6))]
    names = draw(st.lists(NAME, min_size=len(kinds), max_size=len(kinds), unique=True))
    rows = draw(st.lists(st.tuples(*(NUMBER if number else NAME for number in kinds)), min_size=1, max_size=4))
    return list(zip(names, kinds, strict=True)), rows


def printed(heads, rows, width, **more):
    console = Console(file=io.StringIO(), width=width)
    console.print(*fitted(heads, rows, width, **more), sep="\n")
    return console.file.getvalue()


@given(tables(), st.integers(50, 200), st.sampled_from([box.HEAVY_HEAD, box.SIMPLE_HEAD]))
def test_a_table_keeps_to_the_terminal_and_says_which_columns_have_no_room(table, width, lines):
    heads, rows = table
    shown = printed(heads, rows, width, lines=lines)
    assert all(len(line) <= width for line in shown.splitlines()) and "…" not in shown
    said = re.search(r"Not shown in \d+ columns: (.*)\.", " ".join(shown.split()))
    left_out = [name for name, _ in heads if said and f", {name}," in f", {said[1]},"]
    for at, (name, number) in enumerate(heads):
        if name not in left_out:
            words = [word for row in rows for word in ([row[at]] if number else row[at].split())]
            assert [word for word in words if word not in shown] == []
    assert heads[0][0] not in left_out


@given(tables())
def test_without_a_width_all_columns_are_there_and_no_heading_takes_more_than_two_lines(table):
    heads, rows = table
    shown = printed(heads, rows, 10_000, lines=box.SIMPLE_HEAD)
    assert "Not shown" not in shown
    above = shown[: shown.index("─")].splitlines()
    assert len(above) <= 1 + 2 + 1  # rich's empty line, the heading, the rule's own indentation


@pytest.mark.parametrize(("width", "gone"), [(36, None), (28, "losses"), (20, "losses, rate")])
def test_the_columns_that_matter_least_go_first(width, gone):
    heads = [("run", False), ("losses", False), ("step", True), ("rate", True)]
    shown = printed(heads, [("a", "denoising 0.3517", "400/400", "4.11")], width, first_out=["losses"])
    assert (f"Not shown in {width} columns: {gone}." in " ".join(shown.split())) if gone else "Not shown" not in shown
