"""What a source held and holds: additions, removals and edits are named; names of stores change only on request."""

import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste.files.sources import SourceRecord, identity_of, pictures_of

NAMES = st.text(st.characters(exclude_categories=[]), min_size=1, max_size=6)
CONTENTS = st.dictionaries(NAMES, st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=6)


def lines(content):
    return pictures_of((name, size, label) for name, (size, label) in content.items())


@settings(max_examples=300, deadline=None)
@given(CONTENTS, CONTENTS)
def test_contents_have_one_identity_exactly_if_names_sizes_and_labels_are_equal(one, other):
    assert (identity_of(lines(one)) == identity_of(lines(other))) == (one == other)
    assert identity_of(lines(one)) == identity_of(lines(dict(reversed(one.items()))))


@pytest.fixture
def record(tmp_path):
    return SourceRecord(str(tmp_path), "images-abc")


BEFORE = {"a.png": (1, 0), "b.png": (2, 0), "c.png": (3, 1)}


def test_what_was_added_removed_and_changed_is_said_with_names(record):
    assert record.changes("pics", lines(BEFORE)) == ""  # nothing was made yet
    record.use("pics", lines(BEFORE))
    assert record.changes("pics", lines(BEFORE)) == ""
    now = {"a.png": (1, 0), "b.png": (5, 0), **{f"new{i}.png": (1, 0) for i in range(10)}}
    said = record.changes("pics", lines(now))
    assert "10 pictures were added (new0.png, new1.png, new2.png, ...)" in said
    assert "1 picture was removed (c.png)" in said and "1 picture was changed (b.png)" in said
    assert said.startswith("pics: ") and said.endswith("the change is not used")
    assert "a.png" not in said


def test_a_label_that_changed_is_a_change(record):
    record.use("pics", lines(BEFORE))
    assert "1 picture was changed (c.png)" in record.changes("pics", lines({**BEFORE, "c.png": (3, 0)}))


def test_the_first_content_has_the_plain_name_another_one_its_own_and_the_first_gets_its_name_back(record):
    assert record.content == ""
    record.use("pics", lines(BEFORE))
    assert record.content == ""
    more = {**BEFORE, "d.png": (4, 1)}
    with pytest.raises(ValueError, match=r"pics: 1 picture was added \(d.png\).*haste images --update"):
        record.check("pics", lines(more))
    assert record.content == ""
    record.use("pics", lines(more))
    assert record.content == identity_of(lines(more))
    record.check("pics", lines(more))
    record.use("pics", lines(BEFORE))
    assert record.content == ""


def test_an_edit_of_equal_size_is_refused_where_the_store_is_made_again(record):
    record.use("pics", lines(BEFORE))
    record.check_store("1" * 64)
    record.check_store("1" * 64)
    with pytest.raises(ValueError, match="although names and sizes are equal: pictures were edited since, or"):
        record.check_store("2" * 64)
    record.use("pics", lines({}))
    record.check_store("2" * 64)  # another content may give another store


def test_without_the_list_of_names_a_change_is_said_by_count(record, tmp_path):
    record.use("pics", lines(BEFORE))
    (names,) = tmp_path.glob("sources/*.gz")
    for damage in (gzip.compress(b"x" * 1000)[:-20], b"", b"no gzip"):
        names.write_bytes(damage)
        assert "4 pictures, and 3 on 20" in record.changes("pics", lines({**BEFORE, "d.png": (4, 1)}))
