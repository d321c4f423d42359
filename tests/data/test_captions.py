"""The condition `captions`: which text a visit is told, its states, and training on them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import captioned
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from haste import config
from haste.cli import main as cli
from haste.data import order
from haste.data.batches import Batches
from haste.data.captions import TEXT_BYTES, Captions
from haste.data.digits import MovedDigits
from haste.data.text_encoder import TextEncoder
from haste.data.words import Words
from haste.files import artefact, provenance
from haste.files.npz import read_npz
from haste.files.store import Store
from haste.files.texts import FILE
from haste.metrics.detectors import open_detector
from haste.plan.plan import Plan
from haste.sampling import grids
from haste.train import loop

TINY = Path(__file__).parents[1] / "tiny.yaml"
IMAGES = {"source": "moved-digits", "resolution": 8, "classes": 10, "holdout": 97, "subset": 60, "shards": 1}
WORDS = {"name": "captions", "encoder": "words", "tokens": captioned.TOKENS, "width": captioned.WIDTH}


@pytest.fixture
def says(monkeypatch):
    """A network that is told captions, by its name."""
    monkeypatch.setitem(config.DENOISERS, "says", "captioned:Says")


@pytest.fixture(scope="session")
def clip(once):
    return once("clip", captioned.save_clip)


def raw(tiny, root, **changes):
    quick = {"sampler": "euler", "steps": 2, "count": 12, "guidance": 1.5, "split": "held_out"}
    return {
        **tiny,
        "results": str(root),
        "images": IMAGES,
        "autoencoder": {**tiny["autoencoder"], "shards": 1},
        "condition": WORDS,
        "models": {"dot": {"architecture": "says", "width": 8}},
        "alignments": {"REPA": {"features": {"teacher": "vit", "depth": 1, "hidden": 16}}},
        "sampling": {"quick": quick},
        "runs": {"REPA": {"alignment": "REPA", "stop": 12}},
        **changes,
    }


class Toy:
    """A results folder of moved digits, and its configuration."""

    def __init__(self, tiny, folder):
        self.tiny, self.folder, self.root = tiny, folder, folder / "results"
        self.configure()

    def configure(self, **changes):
        self.raw = raw(self.tiny, self.root, **changes)
        self.file = self.folder / "toy.yaml"
        self.file.write_text(json.dumps(self.raw))
        self.plan = Plan(config.resolve(self.raw))

    def run(self, *command):
        assert cli.main([*map(str, command), "-c", str(self.file)]) == 0, command

    def refused(self, capsys, *command):
        assert cli.main([*map(str, command), "-c", str(self.file)]) == 2, command
        return capsys.readouterr().err

    def condition(self):
        recipe = self.plan.trajectories[self.plan.state("REPA", 8).trajectory].recipe
        return config.condition_in(recipe).opened(self.plan)

    def batches(self, size=30):
        recipe = self.plan.trajectories[self.plan.state("REPA", 8).trajectory].recipe
        recipe = {**recipe, "training": {**recipe["training"], "batch": size}}
        return Batches.of(recipe, Store.of(self.plan.latents), condition=self.condition())


@pytest.fixture(scope="session")
def _made(once):
    """Everything up to training."""

    def fill(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(config.DENOISERS, "says", "captioned:Says")
            toy = Toy(yaml.safe_load(TINY.read_text()), folder)
            for how in (["--shard", 0], ["--join"]):
                toy.run("images", *how)
            toy.run("autoencoder")
            toy.run("teacher", "vit")
            toy.run("detector")
            toy.run("reference")
            for how in (["--shard", 0], ["--join"]):
                toy.run("latents", *how)

    return once("captions", fill)


@pytest.fixture
def toy(_made, says, tiny, tmp_path):
    shutil.copytree(_made / "results", tmp_path / "results")
    return Toy(tiny, tmp_path)


@pytest.fixture
def told(toy, clip):
    """With the states of a CLIP on disk, in two shards."""
    toy.configure(condition={**WORDS, "encoder": str(clip)}, cache={"shards": 2})
    for how in (["--shard", 0], ["--shard", 1], ["--join"]):
        toy.run("text", *how)
    return toy


# ---- which caption


def test_each_caption_of_an_image_is_told_equally_often_and_a_visit_is_a_function_of_its_position(toy):
    condition, count = toy.condition(), 4000
    images = np.arange(count) % 60
    rows = {"index": images}
    all_of = {i: condition.texts.of_image(i) for i in range(60)}
    assert all(len({*texts}) == 2 for texts in all_of.values())
    seen = condition._drawn(images, order.uniforms(3, "caption", 5, range(count)))
    said = condition.words(seen)
    assert all(text in all_of[i] for i, text in zip(images.tolist(), said, strict=True))
    first = sum(text == all_of[i][0] for i, text in zip(images.tolist(), said, strict=True))
    assert abs(first - count / 2) < 5 * np.sqrt(count / 4)
    whole = condition.batch(rows, seed=3, step=5, visits=range(count), dropout=0.0)
    np.testing.assert_array_equal(whole, condition.told(seen))
    some = condition.batch({"index": images[70:90]}, seed=3, step=5, visits=range(70, 90), dropout=0.0)
    np.testing.assert_array_equal(some, whole[70:90])
    assert (condition.batch(rows, seed=3, step=6, visits=range(count), dropout=0.0) != whole).any()


def test_the_share_that_is_dropped_gets_the_states_of_the_empty_caption(toy):
    condition, count = toy.condition(), 4000
    batch = condition.batch({"index": np.arange(count) % 60}, seed=1, step=2, visits=range(count), dropout=0.1)
    empty = Words(tokens=captioned.TOKENS, width=captioned.WIDTH)([""])[0].astype(np.float32)
    none = (batch == empty).all(axis=(1, 2))
    assert abs(none.sum() - count / 10) < 5 * np.sqrt(count * 0.09)
    np.testing.assert_array_equal(none, order.uniforms(1, "class dropout", 2, range(count)) < 0.1)
    np.testing.assert_array_equal(condition.null(2), np.stack([empty, empty]))


def test_batches_are_the_same_for_any_number_of_ranks_and_microbatches(told):
    batches = told.batches()
    whole = batches(4)
    parts = [batches(4, range(low, low + 10)) for low in (0, 10, 20)]
    assert torch.equal(torch.cat([part.condition for part in parts]), whole.condition)
    assert torch.equal(torch.cat([part.condition for part in whole.microbatches(3)]), whole.condition)
    assert whole.condition.shape == (30, captioned.TOKENS, captioned.WIDTH) and whole.condition.dtype == torch.float32
    measured = batches.measured(batches.reading_indices(5), range(5))
    assert torch.equal(measured.condition, batches.measured(batches.reading_indices(5), range(5)).condition)


# ---- states


def test_states_are_the_text_models_last_ones_after_its_norm_with_padding_and_no_mask(told, clip):
    from transformers import CLIPModel, CLIPTokenizer

    condition = told.condition()
    rows = condition._drawn(np.arange(6), np.zeros(6))
    ids = CLIPTokenizer.from_pretrained(clip)(
        [*condition.words(rows), ""], padding="max_length", max_length=captioned.TOKENS, truncation=True
    )["input_ids"]
    with torch.no_grad():
        model = CLIPModel.from_pretrained(clip).eval().text_model
        states = model(input_ids=torch.tensor(ids)).last_hidden_state.numpy()
        masked = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(ids) < 519).last_hidden_state.numpy()
    found = np.concatenate([condition.told(rows), condition.null(1)])
    np.testing.assert_allclose(found, states, atol=2e-3)  # float16
    assert np.abs(states - masked).max() > 0.1  # so that the right one is told apart
    assert np.abs(states[0] - states[-1]).max() > 0.01


def test_states_made_as_needed_are_those_on_disk(told):
    kept = told.condition()
    rows = kept.sampled(told.plan.config.sampling["quick"], range(12))
    wanted, null, names = kept.told(rows), kept.null(1), str(told.plan.state("REPA", 8))
    shutil.rmtree(told.plan.text.folder)
    told.configure(condition={**told.raw["condition"], "cache": False})
    assert told.plan.text is None and str(told.plan.state("REPA", 8)) == names
    online = told.condition()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "_encoded", None)  # it is there before threads ask for it
        np.testing.assert_allclose(online.null(1), null, atol=1e-3)
    np.testing.assert_allclose(online.told(rows), wanted, atol=1e-3)
    assert online.identities == kept.identities and {"captions", "text encoder", "tokenizer"} == {*kept.identities}


def test_prompts_are_never_told_by_another_encoder_than_the_captions(told, tmp_path, monkeypatch):
    condition = told.condition()
    rows = condition.sampled(config.Sampling(sampler="euler", steps=2, prompts=["a red bus"]), range(2))
    assert condition.told(rows).shape == (2, captioned.TOKENS, captioned.WIDTH)
    captioned.save_clip(tmp_path / "other", seed=1)  # as if the hub's had changed since the plan was made
    monkeypatch.setitem(told.plan.config.condition.model_extra, "encoder", str(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"{told.plan.text.folder}: encoded by the text encoder .*, but .*other holds"):
        told.condition().told(rows)


def test_an_encoder_that_is_trained_here_makes_the_states_and_another_one_is_refused(toy, capsys):
    small = {"steps": 1, "batch": 4, "depth": 1, "heads": 2}
    toy.configure(condition={**WORDS, "encoder": {"trained": small}})
    part, key = toy.plan.text_encoder, toy.plan.text.key
    encoding = [job for rule in ("text_encoder", "text") for job in toy.plan.jobs.left[rule]]
    assert [job.rule for job in encoding] == ["text_encoder", "text"] and part.manifest in encoding[1].waits_for
    (row,) = {row.evaluation.name: row for row in toy.plan.rows if row.step == 8}.values()
    assert part.manifest not in toy.plan.drawn_from(row.evaluation)  # whose captions are in the store
    toy.run("text-encoder")
    for how in (["--shard", 0], ["--join"]):
        toy.run("text", *how)
    kept, own = toy.condition(), TextEncoder.load(part.folder, tokens=captioned.TOKENS, width=8, masked=False)
    np.testing.assert_array_equal(kept.null(1), own([""]))
    prompts = kept.sampled(config.Sampling(sampler="euler", steps=2, prompts=["a red bus"]), range(1))
    np.testing.assert_array_equal(kept.told(prompts), own(["a red bus"]))
    assert kept.identities == {"captions": kept.texts.sha256, **own.identities}
    toy.run("text-encoder")  # it is there
    assert own.identities == TextEncoder.load(part.folder, tokens=captioned.TOKENS, width=8, masked=False).identities

    with open(Path(part.folder, "tokenizer_config.json"), "a") as file:
        file.write("\n")
    toy.configure(condition={**WORDS, "encoder": {"trained": small}})
    with pytest.raises(ValueError, match=f"{toy.plan.text.folder}: encoded by the tokenizer .*, but .* holds"):
        toy.plan.check()
    asked = {"quick": {"sampler": "euler", "steps": 2, "prompts": ["a red bus"]}}
    toy.configure(condition={**WORDS, "encoder": {"trained": small}}, sampling=asked)
    assert all(part.manifest in toy.plan.drawn_from(row.evaluation) for row in toy.plan.rows)
    shutil.rmtree(part.folder)
    with pytest.raises(ValueError, match="no text encoder, expected the one that `haste text-encoder` trains"):
        toy.condition().told(prompts)
    toy.configure(condition={**WORDS, "encoder": {"trained": {**small, "seed": 1}}})
    assert toy.plan.text.key != key and toy.plan.text_encoder.key != part.key
    toy.configure()
    assert "condition.encoder: not one that this configuration trains" in toy.refused(capsys, "text-encoder")


def test_an_edited_tokenizer_is_another_encoder(tiny, says, clip, tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    given = raw(tiny, tmp_path / "results", condition={**WORDS, "encoder": str(folder)})
    before = Plan(config.resolve(given)).text.key
    assert Plan(config.resolve(given)).text.key == before
    with open(folder / "merges.txt", "a") as merges:
        merges.write("s e</w>\n")
    assert Plan(config.resolve(given)).text.key != before


def test_an_encoder_with_code_of_its_own_is_refused_without_a_question_and_not_run(clip, tmp_path, monkeypatch):
    folder, asked = tmp_path / "clip", []
    shutil.copytree(clip, folder)
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nConfig = Model = object")
    own = {"AutoConfig": "theirs.Config", "AutoModelForTextEncoding": "theirs.Model"}
    about = {"model_type": "theirs", "auto_map": own, "hidden_size": captioned.WIDTH}
    (folder / "config.json").write_text(json.dumps(about))
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="cannot be loaded as a text encoder"):
        TextEncoder.load(folder, tokens=captioned.TOKENS, width=captioned.WIDTH, masked=False)
    assert not asked and not (tmp_path / "ran").exists()


def test_words_have_a_vector_each_and_their_place_is_told():
    words = Words(tokens=4, width=6)
    one, other, cut = words(["a three, a", "A five", "a b c d e f"]).astype(np.float64)
    place = words([""])[0].astype(np.float64)
    np.testing.assert_allclose(one[0] - place[0], one[3] - place[3], atol=4e-3)  # a, a
    np.testing.assert_array_equal(one[0], other[0])
    assert np.abs(one[1] - other[1]).max() > 0.1
    np.testing.assert_array_equal(other[2:], place[2:])
    assert cut.shape == (4, 6) and (np.abs(np.diff(place, axis=0)).max(axis=1) > 0.1).all()


# ---- what samples are conditioned on


def test_samples_are_told_a_caption_of_each_held_out_image_in_order(toy):
    condition, way = toy.condition(), toy.plan.config.sampling["quick"]
    rows = condition.sampled(way, range(200))
    images = rows["caption"][:, 0]
    np.testing.assert_array_equal(images, 60 + np.arange(200) % 97)
    said = condition.words(rows)
    assert all(text in condition.texts.of_image(i) for i, text in zip(images, said, strict=True))
    part = condition.sampled(way, range(50, 60))
    assert condition.words(part) == said[50:60] and (part["text"] == rows["text"][50:60]).all()
    other = condition.sampled(way.model_copy(update={"seed": 1}), range(97))
    assert condition.words(other) != said[:97]  # another caption of each
    trained = condition.sampled(way.model_copy(update={"split": "train"}), range(3))
    np.testing.assert_array_equal(trained["caption"][:, 0], [0, 1, 2])
    condition.texts.splits["held_out"] = range(60, 60)
    with pytest.raises(
        ValueError, match="split: held_out, but images.holdout is 0; expected another split, or prompts"
    ):
        condition.sampled(way, range(3))


def test_prompts_are_told_in_turn_and_kept_as_they_are(toy):
    prompts = ["a red bus", "", "“quotes” <b>&amp;</b>\n\u2028\ufeff\0", "x" * TEXT_BYTES]
    way = config.Sampling(sampler="euler", steps=2, prompts=prompts)
    assert way.count == 16
    rows = toy.condition().sampled(way, range(1, 7))
    assert toy.condition().words(rows) == [prompts[i % 4] for i in range(1, 7)]
    assert toy.condition().meant(rows).tolist() == [-1] * 6  # nobody knows which class a prompt means
    closed = Captions(classes=0, encoder="words", tokens=4, width=6, attention_mask=False)
    assert closed.words(rows) == [prompts[i % 4] for i in range(1, 7)]
    for wrong, words in [("\ud800", "surrogates"), ("é" * 513, "sampling.quick.prompts.0: .*1,026 bytes")]:
        with pytest.raises(ValueError, match=words):
            config.resolve(raw(toy.tiny, toy.root, sampling={"quick": {"prompts": [wrong]}}))


# ---- training and sampling


def test_training_with_captions_is_resumed_to_the_bit_sampled_and_told_what_it_was_told(told, tmp_path, capsys):
    state = told.plan.state("REPA", 8)
    file = Path(told.plan.path(state))
    told.run("plan")
    told.run("train", state)
    whole, header = load_file(file), provenance.provenance_of(file)
    assert header["inputs"].items() >= told.condition().identities.items()
    file.unlink()
    asked = iter([0, 0, 0, 0, 1])
    with pytest.raises(loop.Interrupted):
        loop.train(told.plan, state, lambda: next(asked))
    told.run("train", state)
    again = load_file(file)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)

    evaluation = next(row.evaluation for row in told.plan.rows if row.step == 8)
    told.run("sample", evaluation.name)
    found = read_npz(evaluation.sample_file(0), "samples")
    rows = {name: found[name] for name in ("caption", "text")}
    said = told.condition().words(rows)
    assert found["arr_0"].shape == (12, 8, 8, 3) and all(" " in text for text in said)
    made = provenance.provenance_of(Path(evaluation.sample_file(0)))["inputs"]
    assert made.keys() == {"weights", "autoencoder", "captions", "text encoder", "tokenizer"}
    assert made.items() >= told.condition().identities.items()
    told.run("evaluate", evaluation.name)
    with Store.open(evaluation.features.folder) as store:
        assert told.condition().words({name: store.read(name, range(12)) for name in rows}) == said
        read = store.read("logits", range(12)).argmax(axis=1)
    numbers = [MovedDigits.WORDS.index(next(word for word in re.findall(r"\w+", text) if word in MovedDigits.WORDS))
               for text in said]  # fmt: skip
    accuracy = artefact.read_json(evaluation.score, "score")["scores"]["caption_accuracy"]
    assert accuracy == np.mean(read == numbers) and len({*numbers}) > 4
    told.run("grid", evaluation.name)
    assert provenance.provenance_of(Path(evaluation.grid))["words"] == said

    # `haste draw` draws the same of the same captions, and what it is asked for
    options = ["-c", str(told.file), "--device", "cpu", "--out", str(tmp_path / "drawn.npz")]
    assert cli.main(["draw", str(file), "--count", "5", *options]) == 0
    assert (read_npz(tmp_path / "drawn.npz", "drawing")["arr_0"] == found["arr_0"][:5]).all()
    assert cli.main(["draw", str(file), "--prompt", "a red bus", "--prompt", "a cat", *options]) == 0
    drawn, record = read_npz(tmp_path / "drawn.npz", "drawing"), provenance.provenance_of(tmp_path / "drawn.npz")
    assert drawn["arr_0"].shape == (8, 8, 8, 3) and record["pictures"] == ["a red bus", "a cat"] * 4
    assert record["provenance"]["inputs"] == made
    assert cli.main(["draw", str(file), "--class", "3", *options]) == 2
    assert "trained with captions and knows no classes; ask for prompts" in capsys.readouterr().err

    # so does a file of its weights alone, which needs no image of the configuration
    bare = tmp_path / "bare.safetensors"
    assert cli.main(["export", str(file), str(bare), "--format", "safetensors"]) == 0
    shutil.move(told.plan.images.folder, tmp_path / "images")
    asked = ["--model", "dot", "--sampling", "quick", "--prompt", "a red bus", "--prompt", "a cat"]
    assert cli.main(["draw", str(bare), *asked, *options]) == 0
    assert (read_npz(tmp_path / "drawn.npz", "drawing")["arr_0"] == drawn["arr_0"]).all()
    shutil.move(tmp_path / "images", told.plan.images.folder)

    # CLIP score of every sample and its caption, by a detector that is added later
    where = told.raw["condition"]["encoder"]
    by_clip = {"clip": {"pretrained": {"name": "clip", "weights": where}}}
    told.configure(
        condition=told.raw["condition"], cache=told.raw["cache"], detector={**told.raw["detector"], **by_clip}
    )
    evaluation = next(row.evaluation for row in told.plan.rows if row.step == 8)
    told.run("reference")
    shutil.move(told.plan.text.folder, tmp_path / "text")  # words are read without states or their encoder
    for name in ("features", "evaluate"):
        told.run(name, evaluation.name, "--detector", "clip")
    shutil.move(tmp_path / "text", told.plan.text.folder)
    clip = open_detector("clip", where)
    cosines = clip.cosines(clip.arrays(found["arr_0"], "samples")["pool"], said).astype(np.float64)
    score = artefact.read_json(evaluation.judgement("clip").score, "score")["scores"]
    assert score["clip_score"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-4)
    assert score["clip_score_std"] == pytest.approx(100 * np.maximum(cosines, 0).std(ddof=1) / 12**0.5, rel=1e-3)

    # another tokenizer's states are refused, before anything is trained with them
    other = tmp_path / "other"
    shutil.copytree(told.raw["condition"]["encoder"], other)
    with open(other / "merges.txt", "a") as merges:
        merges.write("s e</w>\n")
    moved = told.plan.text
    told.configure(condition={**told.raw["condition"], "encoder": str(other)})
    shutil.copytree(moved.folder, told.plan.text.folder)
    manifest = Path(told.plan.text.manifest)
    made = {**json.loads(manifest.read_text()), "key": told.plan.text.key, "recipe": told.plan.text.recipe}
    manifest.write_text(json.dumps(made))
    assert "encoded by the tokenizer" in told.refused(capsys, "plan")


def test_an_mmdit_is_aligned_on_captions_stopped_and_drawn_with_guidance(told):
    layers = {"teacher": "vit", "student_layers": [0, 1], "teacher_layers": [0, 1]}
    haste = {"features": {"teacher": "vit", "depth": 1, "hidden": 16}, "attention": layers}
    told.configure(
        **{key: told.raw[key] for key in ("condition", "cache")},
        models={"dot": {"architecture": "mmdit", "depth": 2, "width": 16, "heads": 2}},
        alignments={"HASTE": haste},
        sampling={**told.raw["sampling"], "asked": {"sampler": "euler", "steps": 2, "prompts": PROMPTS, "count": 26}},
        runs={"HASTE": {"alignment": "HASTE", "stop": 2, "milestones": [3], "sampling": ["quick", "asked"]}},
    )
    told.run("plan")
    for step in (2, 3):
        told.run("train", told.plan.state("HASTE", step))
    states = [load_file(told.plan.path(told.plan.state("HASTE", step))) for step in (2, 3)]
    assert "projectors/features/0.weight" in states[0] and "projectors/features/0.weight" not in states[1]
    name = "model/context_embedder.weight"
    assert states[0][name].shape == (16, captioned.WIDTH) and (states[0][name] != states[1][name]).all()
    told.run("sample", told.plan.rows[0].evaluation.name)
    assert read_npz(told.plan.rows[0].evaluation.sample_file(0), "samples")["arr_0"].shape == (12, 8, 8, 3)

    # six prompts are two rows of three, and all samples are shown
    asked = next(one for one in told.plan.evaluations.values() if one.sampling.prompts)
    told.run("sample", asked.name)
    told.run("grid", asked.name)
    assert provenance.provenance_of(Path(asked.grid))["words"] == [PROMPTS[i % 6] for i in range(26)]
    cell = 8 * grids.SCALE + grids.GAP
    with Image.open(asked.grid) as grid:
        assert grid.size == (3 * cell, 9 * cell)
        left, top = 25 % 3 * cell + grids.GAP // 2, 25 // 3 * cell + grids.GAP // 2
        shown = np.asarray(grid.crop((left, top, left + 16, top + 16)))[::2, ::2, :3]
    whole = read_npz(asked.sample_file(0), "samples")["arr_0"]
    np.testing.assert_array_equal(shown, whole[25])

    # the same picture of the same prompt, in however many shards and batches
    shutil.rmtree(asked.folder)
    told.configure(**{**told.raw, "runtime": {**told.raw["runtime"], "sample_shards": 3, "sample_batch": 5}})
    asked = told.plan.evaluations[asked.name]
    for shard in range(3):
        told.run("sample", asked.name, "--shard", shard)
    parts = [read_npz(asked.sample_file(shard), "samples")["arr_0"] for shard in range(3)]
    assert np.abs(np.concatenate(parts).astype(int) - whole).max() <= 1


PROMPTS = ["a cat", "three", "", "a red bus", "at", "a three"]


def test_captions_that_changed_are_refused_where_states_were_made_from_the_earlier_ones(told):
    folder, manifest = Path(told.plan.images.folder), Path(told.plan.images.manifest)
    lines = folder.joinpath(FILE).read_bytes().replace(b"three", b"seven")
    folder.joinpath(FILE).write_bytes(lines)
    with pytest.raises(ValueError, match="captions.jsonl: damaged"):
        told.condition()
    made = json.loads(manifest.read_text())
    made["captions"]["sha256"] = hashlib.sha256(lines).hexdigest()
    manifest.write_text(json.dumps(made))
    with pytest.raises(ValueError, match="encoded from captions"):
        told.condition()


def test_measures_tell_images_of_evaluation_their_own_captions_by_the_encoder_of_training(told, capsys):
    said = {f"{label}/{i}.png": [f"a {MovedDigits.WORDS[label]} cat", "at"] for label in range(10) for i in range(2)}
    for place, name in enumerate(said):
        (told.folder / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 8), (9 * place, 20, 30)).save(told.folder / "val" / name)
    file = told.folder / "said.jsonl"
    file.write_text("".join(json.dumps({"file": name, "caption": texts}) + "\n" for name, texts in said.items()))
    others = {"path": str(told.folder / "val"), "captions": str(file)}
    loss = {"measure": "denoising", "images": 16, "groups": 8, "t": [0.5], "split": "evaluation"}
    kept = {key: told.raw[key] for key in ("condition", "cache")}
    told.configure(**kept, evaluation=others, measures={"loss": loss}, runs={"REPA": {"measures": ["loss"]}})
    plan = told.plan.of("evaluation")
    assert plan.text != told.plan.text and {plan.text.manifest, told.plan.text.manifest} <= {
        *told.plan.measured_from(told.plan.measured[0].measurement)
    }
    for command in (["images", "--shard", 0], ["images", "--join"], ["text", "--shard", 0], ["text", "--shard", 1]):
        told.run(command[0], "--evaluation", *command[1:])
    told.run("text", "--evaluation", "--join")
    for how in (["--shard", 0], ["--join"]):
        told.run("latents", "--evaluation", *how)
    told.run("plan")
    state = told.plan.state("REPA", 8)
    told.run("train", state)
    told.run("measure", "loss", told.plan.path(state))
    made = artefact.read_json(told.plan.measured[0].measurement.file, "measure")["provenance"]["inputs"]
    assert made["captions of evaluation"] != made["captions"]
    condition = config.condition_in(told.plan.trajectories[state.trajectory].recipe).opened(plan)
    batches = told.batches().of_all(Store.of(plan.latents), condition)
    words = condition.words(condition._drawn(np.arange(20), order.uniforms(0, "caption", 0, range(20))))
    assert all(text in texts for text, texts in zip(words, said.values(), strict=True)) and len({*words}) > 3
    own = TextEncoder.load(told.raw["condition"]["encoder"], tokens=captioned.TOKENS, width=8, masked=False)
    assert torch.equal(batches.measured(np.arange(20), range(20)).condition, torch.from_numpy(own(words)).float())
    told.configure(**kept, evaluation={"path": str(told.folder / "val"), "captions": str(file), "classes": 10})
    with pytest.raises(
        ValueError, match="evaluation: models are conditioned on captions, but these images have none; expected"
    ):
        told.configure(**kept, evaluation={"path": str(told.folder / "val")})


# ---- refused before the first job


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"condition": {**WORDS, "width": 12}}, None),
        ({"condition": "labels"}, "condition: labels, but dot is a network that takes captions"),
        ({"images": {**IMAGES, "source": "digits"}}, "condition: captions, but the images have none"),
        ({"images": {**IMAGES, "holdout": 0}}, "sampling.quick.split: held_out, but images.holdout is 0"),
        ({"sampling": {"quick": {"labels": "balanced"}}}, "labels: balanced, but samples are conditioned on captions"),
        ({"condition": {**WORDS, "encoders": "x"}}, "unknown key 'encoders'; did you mean 'encoder'?"),
        ({"images": {**IMAGES, "subset": 1800}}, "images.subset: 1,800, but there are 1,700 training images"),
        ({"condition": {**WORDS, "encoder": "/nowhere"}}, "text encoder /nowhere: found no such folder"),
        ({"condition": {**WORDS, "encoder": {"trained": {"steps": 2}}}}, None),
        ({"condition": {**WORDS, "encoder": {"trained": {"step": 2}}}}, "condition.encoder.trained.steps: missing"),
        (
            {"condition": {**WORDS, "encoder": {"trained": {"steps": 2, "step": 2}}}},
            "condition.encoder.trained.step: unknown key; did you mean 'steps'?",
        ),
        (
            {"condition": {**WORDS, "encoder": {"trained": {"steps": 2, "heads": 3}}}},
            "condition.encoder.trained.heads: 3 does not divide condition.width 8",
        ),
        (
            {"condition": {**WORDS, "encoder": {"trained": {"steps": 2, "patch": 3}}}},
            "condition.encoder.trained.patch: 3 does not divide images.resolution 8",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(tiny, says, tmp_path, changes, words):
    def check():
        Plan(config.resolve(raw(tiny, tmp_path, **changes))).check()

    if words is None:
        return check()
    with pytest.raises(ValueError, match=re.escape(words)):
        check()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 12}, "condition.width: 12, but the states of"),
        ({"tokens": 10}, "condition.tokens: 10, but"),
        ("vocab.json", "found no tokenizer"),
        ("model.safetensors", "found no model.safetensors"),
        ("config.json", "expected a configuration of transformers"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_before_the_first_job(tiny, says, clip, tmp_path, change, words):
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    if isinstance(change, str):
        (folder / change).unlink()
    given = {**WORDS, "encoder": str(folder), **(change if isinstance(change, dict) else {})}
    with pytest.raises(ValueError, match=words):
        Plan(config.resolve(raw(tiny, tmp_path / "results", condition=given))).check()


def test_prompts_are_refused_where_samples_are_told_labels(tiny):
    tiny["sampling"]["quick"]["prompts"] = ["a three"]
    with pytest.raises(ValueError, match="sampling.quick.prompts: .* but samples are conditioned on labels"):
        config.resolve(tiny)


def test_the_plan_says_the_bytes_of_the_states(told):
    with Store.of(told.plan.text) as store, Path(told.plan.images.manifest).open() as manifest:
        count = json.load(manifest)["captions"]["count"]
        assert count == 2 * (60 + 97) and store.count == count + 1
        assert told.plan.data.text_bytes == store.count * captioned.TOKENS * captioned.WIDTH * 2
    published = {"encoder": "openai/clip-vit-large-patch14", "tokens": 77, "width": 768}
    told.configure(condition={"name": "captions", **published})
    assert told.plan.data.text_bytes == (count + 1) * 77 * 768 * 2
    told.configure(condition={**WORDS, "encoder": "some/thing"}, cache={"max_bytes": 10_000})
    with pytest.raises(ValueError, match=r"cache.max_bytes: 10000 allows .*; what would fit: condition.cache: false"):
        told.plan.check()
