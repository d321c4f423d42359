"""Files of the hub by id: fetched once, kept by commit, checked, and refused with what to do."""

import re
import threading

import pytest
from hub import serving
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from haste.networks import hub, hub_files
from haste.networks.hub_files import HubFile, hub_file, local, origin

IT, FIRST, SECOND = "hub:own/sit/deep/a.pt", "1" * 40, "2" * 40


@pytest.fixture
def server(monkeypatch, tmp_path):
    hub._silence.cache_clear()
    with serving(monkeypatch, str(tmp_path / "cache")) as found:
        found.put("own/sit", "deep/a.pt", b"first", FIRST)
        yield found
    hub._silence.cache_clear()


NAMES = st.text("aZ0._-", min_size=1, max_size=6).filter(lambda name: name not in (".", ".."))


@given(
    owner=NAMES, name=NAMES, path=st.lists(NAMES, min_size=1, max_size=3), revision=st.sampled_from(["", "v1", FIRST])
)
def test_an_id_is_read_as_what_it_says(owner, name, path, revision):
    of = HubFile(f"{owner}/{name}", "/".join(path), revision)
    assert hub_file(str(of)) == of
    assert hub_file(str(of).removeprefix("hub:")) is None


@pytest.mark.parametrize("said", ["hub:", "hub:a.pt", "hub:own/a.pt", "hub:o/n/../a.pt", "hub:o/n//a.pt", "hub:o/n/a@"])
def test_what_begins_as_an_id_and_is_none_is_refused_with_an_example(said):
    with pytest.raises(ValueError, match=re.escape(f"found {said!r}, expected hub:OWNER/NAME/PATH")):
        hub_file(said)


def test_a_file_is_fetched_once_and_known_by_its_commit_and_another_revision_is_another_file(server):
    found = local(IT)
    assert found.read_bytes() == b"first" and origin(found) == f"{IT}@{FIRST}"
    server.asked.clear()
    assert local(IT) == found == local(f"{IT}@{FIRST}") and server.asked == []
    server.put("own/sit", "deep/a.pt", b"second", SECOND)
    assert local(IT) == found, "what is here is not asked for again"
    assert local(f"{IT}@{SECOND}").read_bytes() == b"second" and found.read_bytes() == b"first"
    assert origin("some/a.pt") == "some/a.pt"


def test_a_damaged_download_is_refused_with_what_was_found_and_fetched_anew_once_it_is_removed(server):
    server.damaged.add("deep/a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt@{FIRST}: damaged: .* sha256 8855508aade1.*a7937b64b8ca") as refused:
        local(IT)
    blob = re.search(r"Remove (\S+) and fetch it again", str(refused.value))[1]
    server.damaged.clear()
    hub_files.Path(blob).unlink()
    assert local(IT).read_bytes() == b"first"


def test_two_processes_that_fetch_at_once_load_it_once(server):
    found = []
    threads = [threading.Thread(target=lambda: found.append(local(IT).read_bytes())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [b"first"] * 3 and server.sent("deep/a.pt") == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            "hub:own/closed/a.pt",
            ["own/closed is gated", "https://huggingface.co/own/closed", "hf auth login", "HF_TOKEN"],
        ),
        ("hub:own/none/a.pt", ["no repository own/none", "check its name", "private", "HF_TOKEN"]),
        ("hub:own/sit/b.pt", ["own/sit has no file b.pt", "tree/main"]),
        (f"{IT}@v9", ["own/sit has no revision v9", "commits/main"]),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(server, asked, said):
    server.put("own/closed", "a.pt", b"secret")
    server.gated.add("own/closed")
    with pytest.raises(ValueError) as refused:
        local(asked)
    assert all(words in str(refused.value) for words in [f"{asked}: ", *said]), refused.value


@pytest.mark.parametrize("offline", [True, False])
def test_where_nobody_answers_the_file_to_bring_and_its_place_are_named(monkeypatch, tmp_path, server, offline):
    hub._silence.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(ValueError) as refused:
        local(IT)
    why = (
        "fetched: HF_HUB_OFFLINE forbids it." if offline else "fetched: <urlopen error [Errno 111] Connection refused>."
    )
    said = ["models--own--sit", str(tmp_path / "cache"), "bring a.pt from", why]
    assert all(words in str(refused.value) for words in said), refused.value
