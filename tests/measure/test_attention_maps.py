"""Attention maps: against whole maps in float64, of queries and keys that are brought to the teacher's grid by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from measure_cells import cells, tokens_of
from safetensors.torch import load_file
from toy_gradients import coarser, tapped

from haste.align.losses import attention_loss
from haste.config import resolve
from haste.data import order
from haste.files.store import Store
from haste.measure.attention_maps import rows
from haste.teachers import targets

MAPS = {"measure": "attention-maps", "images": 2, "t": [0.25, 0.75], "pairs": [[1, 0], [2, 1]], "query": 1}


def maps(q, k):
    """Whole maps of (B, H, N, K), in float64."""
    logits = np.asarray(q, np.float64) @ np.asarray(k, np.float64).swapaxes(-1, -2) / np.sqrt(np.shape(q)[-1])
    found = np.exp(logits - logits.max(-1, keepdims=True))
    return found / found.sum(-1, keepdims=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(0.1, 30))
def test_a_row_is_that_of_the_whole_map_and_the_mean_over_all_rows_is_the_attention_loss(seed, tokens, scale):
    random = np.random.default_rng(seed)
    pair = [scale * random.normal(size=(2, 3, tokens, width)) for width in (5, 5, 8, 8)]
    each, (student, teacher) = [], (maps(*pair[:2]), maps(*pair[2:]))
    for query in range(tokens):
        found = rows(*map(torch.from_numpy, pair), query)
        for log_row, whole in zip(found, (student, teacher), strict=True):
            np.testing.assert_allclose(log_row.exp(), whole[:, :, query], rtol=1e-9, atol=1e-12)
        each.append(-(found[1].exp() * found[0]).sum(-1).mean())
    assert float(attention_loss(*map(torch.from_numpy, pair))) == pytest.approx(float(np.mean(each)), rel=1e-9)


def test_maps_of_the_network_and_the_teacher_stand_side_by_side_with_their_cross_entropy(toy, measured):
    other = {"head": 1, "query": None, "t": [0.75], "pairs": [[2, 1], [1, 1]], "weights": "model"}
    plan = toy(maps=MAPS, second=MAPS | other)
    with Store.open(plan.images.folder) as images:
        held_out = images.range("held_out")
        chosen = held_out.start + order.choice(0, "measured images", 0, 2, len(held_out))
        shown = torch.from_numpy(images.read("image", chosen))
    theirs = targets.load_teacher(plan, "vit")(shown, features=False, attention=[0, 1]).attention
    tensors = load_file(plan.path(plan.state("plain", 8)))
    for label, heads, query, weights in (("maps", slice(None), 1, "ema"), ("second", slice(1, 2), 3, "model")):
        found = measured(plan, label)
        assert found["provenance"]["inputs"].keys() == {"latents", "teacher", "decoder"}
        for row in found["rows"]:
            mine, layer = (int(word.split()[1]) for word in row["layers"].split(", "))
            taps = [tapped(plan, tensors, image, row["t"], f"attention.{mine}", weights) for image in chosen]
            q, k = (torch.cat([coarser(getattr(tap, part)) for tap in taps]) for part in "qk")
            student, teacher = maps(q, k)[:, heads], maps(*theirs[layer])[:, heads]
            entropies = -(teacher * np.log(student)).sum(-1)
            assert row["loss"] == pytest.approx(entropies.mean(), rel=1e-6)
            assert row["row"] == pytest.approx(entropies[:, :, query].mean(), rel=1e-6)
            (picture,) = (one for one in found["pictures"] if one["title"] == f"t {row['t']:g}")
            own = -(teacher * np.log(teacher)).sum(-1)[:, :, query].mean()
            heads_of = f"student {mine}\n{row['row']:.3f}", f"teacher {layer}\n{own:.3f}"
            assert set(heads_of) < set(picture["columns"]) and len(picture["columns"]) == 5
            for name, whole in zip(heads_of, (student, teacher), strict=True):
                for cell, values in zip(cells(picture, 2)[name], whole[:, :, query].mean(1), strict=True):
                    expected = 255 * colormaps["viridis"](values / values.max())[:, :3]
                    np.testing.assert_allclose(tokens_of(cell, 2), expected, atol=3)


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        ({"pairs": None}, {}, "pairs: dot has no published ones, expected layers of it and of the teacher, from 0"),
        ({"pairs": [[2, 0]]}, {}, "measures.it.pairs: dot has no layers [2], expected some of 0 to 1"),
        ({"pairs": [[1, 2]]}, {}, "measures.it.pairs: teacher vit has no layers [2], expected some of 0 to 1"),
        ({"pairs": [[1]]}, {}, "measures.it.pairs.0: List should have at least 2 items"),
        ({"pairs": [[1, 0], [1, 0]]}, {}, "measures.it: pairs [[1, 0], [1, 0]] has a value more than once"),
        ({"heads": 3}, {}, "measures.it.heads: 3, but dot and its teacher have 2 heads together"),
        ({"head": 2}, {}, "measures.it.head: 2, but dot and its teacher have 2 heads together"),
        ({"head": 1, "heads": 1}, {}, "measures.it: head 1 is none of the first 1, which are counted from 0"),
        ({}, {"teachers": {}, "alignments": {}}, "measures.it.teacher: none is named"),
    ],
)
def test_maps_that_cannot_be_are_refused_by_their_key(tiny, spec, changes, words):
    measure = {"measure": "attention-maps", "pairs": [[1, 0]], **spec}
    with pytest.raises(ValueError) as refused:
        resolve({**tiny, **changes, "measures": {"it": measure}, "runs": {"plain": {"measures": ["it"]}}})
    assert words in str(refused.value)
