"""The small text encoder: what it learns, what counts against what, and texts that it has never seen."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from haste.data.digits import MovedDigits
from haste.data.text_encoder import TextEncoder
from haste.files.artefact import read_json
from haste.train import text_encoder
from haste.train.text_encoder import Said, Towers

TOKENS, WIDTH = 10, 32
KNOWN, UNSEEN = range(600), range(600, 700)


@pytest.fixture(scope="module")
def learnt(once):
    """The folder of an encoder of 600 moved digits, judged on 100 others."""

    def fill(folder):
        digits = MovedDigits(16, 100, subset=600)
        given = [np.stack([digits.load(i)[0] for i in KNOWN]), [digits.captions(i) for i in KNOWN]]
        given += [np.stack([digits.load(i)[0] for i in UNSEEN]), [digits.captions(i) for i in UNSEEN]]
        size = {"tokens": TOKENS, "width": WIDTH, "depth": 1, "patch": 8, "seed": 0}
        text_encoder.train(*given, out=folder / "part", steps=150, batch=32, lr=5e-3, **size)

    return once("text-encoder", fill) / "part"


@pytest.fixture
def encoder(learnt):
    return TextEncoder.load(learnt, tokens=TOKENS, width=WIDTH, masked=False)


def test_captions_find_held_out_pictures_that_have_them_a_quarter_of_the_time_and_by_chance_2_times_of_100(learnt):
    found, digits = read_json(learnt / "part.json", "part")["quality"], MovedDigits(16, 100, subset=600)
    said = [digits.captions(i) for i in UNSEEN]
    by_chance = np.mean([np.mean([text in own for own in said]) for text in {text for own in said for text in own}])
    assert found["retrieval_by_chance"] == pytest.approx(by_chance) and by_chance < 0.02
    assert found["retrieval"] > 0.25


def test_words_that_no_caption_had_are_read_by_their_bytes_and_capitals_as_small_letters(encoder):
    texts = ["a large three", "a large zwölf", "a large 🐈", "a large \0\x7f", "", "\n" * 3]
    states = encoder(texts)
    assert states.shape == (6, TOKENS, WIDTH) and np.isfinite(states).all()
    assert len({state.tobytes() for state in states}) == 6
    np.testing.assert_array_equal(encoder(["A LARGE Three"])[0], states[0])
    cut = encoder(["a large three " * 1000])[0]
    np.testing.assert_allclose(cut[:3], states[0, :3], atol=2e-3)  # a text's states do not see what comes after them


def test_padding_does_not_change_the_states_of_a_texts_own_tokens(encoder, learnt):
    masked = TextEncoder.load(learnt, tokens=TOKENS, width=WIDTH, masked=True)
    for text, own in [("a large three, in the middle", 8), ("three", 2), ("", 1)]:
        np.testing.assert_allclose(masked([text])[0, :own], encoder([text])[0, :own], atol=2e-3)


# ---- what counts against what


class Fixed(Towers):
    """Towers whose vectors are given, by picture and by text."""

    def __init__(self, pictures, texts):
        nn.Module.__init__(self)
        self.pictures, self.texts, self.drawn = pictures, texts, []
        self.scale = nn.Parameter(torch.tensor(1.0))

    def seen(self, images):
        return self.pictures[images]

    def told(self, ids):
        self.drawn = ids[:, 0].tolist()
        return self.texts[ids[:, 0]]


def cross_entropy(cosines, allowed):
    """Of each row's own entry, on the diagonal, against those that are allowed."""
    rows = range(len(cosines))
    hot = np.exp(np.exp(1.0) * cosines)
    return np.mean([-np.log(hot[i, i] / sum(hot[i, j] for j in rows if allowed[i][j])) for i in rows])


captions = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=2, max_size=7)


@settings(max_examples=60, deadline=None)
@given(captions, st.integers(0, 2**31))
def test_a_batch_holds_no_caption_against_a_picture_that_has_it_too(numbers, seed):
    rng = np.random.default_rng(seed)
    pictures, texts = rng.normal(size=(len(numbers), 3)), rng.normal(size=(6, 3))
    most = max(map(len, numbers))
    of = torch.tensor([own + [-1] * (most - len(own)) for own in numbers])
    said = Said(torch.arange(6)[:, None], of, torch.tensor([len(own) for own in numbers]))
    towers, batch = Fixed(torch.from_numpy(pictures), torch.from_numpy(texts)), torch.arange(len(numbers))
    loss = towers.loss(batch, batch, said, torch.Generator().manual_seed(seed)).item()
    assert all(text in own for text, own in zip(towers.drawn, numbers, strict=True))
    cosines, rows = pictures @ texts[towers.drawn].T, range(len(numbers))
    allowed = np.array([[i == j or towers.drawn[j] not in numbers[i] for j in rows] for i in rows])
    expected = (cross_entropy(cosines, allowed) + cross_entropy(cosines.T, allowed.T)) / 2
    assert loss == pytest.approx(expected, abs=1e-5)


def test_each_caption_of_a_picture_is_drawn_equally_often():
    said = Said(torch.arange(3)[:, None], torch.tensor([[0, 1, 2]]), torch.tensor([3]))
    towers, pictures = Fixed(torch.ones(1, 3), torch.ones(3, 3)), torch.zeros(900, dtype=torch.long)
    towers.loss(pictures, pictures, said, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(np.bincount(towers.drawn, minlength=3) / 900, 1 / 3, atol=0.05)
