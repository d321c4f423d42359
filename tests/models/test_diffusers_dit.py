"""DiT and diffusers' own: the same outputs and the same latents from the same noise, out to a folder and back."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from haste.cli import main as cli
from haste.diffusion.ddpm import DDPM
from haste.diffusion.respacing import ancestral
from haste.models import diffusers_dit, diffusers_folders
from haste.models.dit import DiT
from haste.models.exchange import open_weights
from haste.models.sit import SiT

SHAPE = {
    **{"depth": 3, "width": 32, "heads": 4, "patch_size": 2, "mlp_ratio": 4.0},
    **{"input_size": 8, "in_channels": 4, "classes": 5},
}


@pytest.fixture
def model():
    """A DiT with no weight at 0."""
    made = DiT(**SHAPE).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


@pytest.fixture
def folder(model, tmp_path):
    AutoencoderKL(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(tmp_path / "autoencoder")  # fmt: skip
    out = tmp_path / "pipeline"
    diffusers_folders.write(
        out, model.state_dict(), {**SHAPE, "architecture": "dit"}, tmp_path / "autoencoder", list("abcde")
    )
    return out


def questions(*steps):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(len(steps), 4, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.tensor(steps), torch.tensor([0, 5, 2, 4])[: len(steps)]  # 5 is the null class


def test_the_pipeline_that_diffusers_loads_computes_our_outputs(model, folder):
    pipeline = DiTPipeline.from_pretrained(folder)
    assert pipeline.labels == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    theirs = diffusers_dit.at_our_times(pipeline.transformer.double().eval())
    x, k, y = questions(0, 1, 500, 999)
    with torch.no_grad():
        ours, _ = model(x, k.double(), y)
        torch.testing.assert_close(theirs(x, timestep=k, class_labels=y).sample, ours, rtol=1e-5, atol=1e-5)


def test_as_loaded_it_differs_by_its_timestep_features_alone(model, folder):
    theirs = DiTTransformer2DModel.from_pretrained(folder / "transformer").double().eval()
    x, k, y = questions(0, 0, 900, 900)
    with torch.no_grad():
        apart = (theirs(x, timestep=k, class_labels=y).sample - model(x, k.double(), y)[0]).abs().amax(dim=(1, 2, 3))
    assert (apart[:2] < 1e-5).all() and (apart[2:] > 1e-4).all()


def test_the_same_noise_through_250_steps_gives_the_latents_of_diffusers_scheduler(model, folder, monkeypatch):
    theirs = diffusers_dit.at_our_times(DiTTransformer2DModel.from_pretrained(folder / "transformer").double().eval())
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(250)
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(251)]
    drawn = iter(noise[1:])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *a, **k: next(drawn))
    labels, x, process = torch.tensor([1, 4]), noise[0], DDPM()

    def outputs(x, t):
        return model(x, process.time(torch.full((2,), t, dtype=torch.float32)).double(), labels)[0]

    with torch.no_grad():
        for k in scheduler.timesteps:
            x = scheduler.step(theirs(x, timestep=k.expand(2), class_labels=labels).sample, k, x).prev_sample
        ours = ancestral(outputs, noise[0], 250, lambda i: noise[1 + i])
    scale = ours.abs().max()
    assert scale.isfinite()
    torch.testing.assert_close(x / scale, ours / scale, rtol=1e-3, atol=1e-4)  # their schedule is in float32


def test_what_goes_out_comes_back_the_same(model, folder):
    found = load_file(folder / "transformer" / diffusers_folders.WEIGHTS)
    shape = diffusers_dit.shape_of(json.loads((folder / "transformer" / "config.json").read_text()))
    assert shape == SHAPE
    back = diffusers_dit.from_diffusers(found, shape)
    expected = model.state_dict()
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name].double(), value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "UNet2DModel"}, "its _class_name is 'UNet2DModel', expected DiTTransformer2DModel"),
        ({"norm_type": "layer_norm"}, "norm_type is 'layer_norm', expected 'ada_norm_zero'"),
        ({"out_channels": 4}, "out_channels is 4, expected 8"),
        ({"num_layers": None}, "has no 'num_layers'"),
    ],
)
def test_another_network_is_refused_with_what_is_wrong(change, words):
    found = {k: v for k, v in {**diffusers_dit.config_of(SHAPE), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        diffusers_dit.shape_of(found)


def test_embedders_that_differ_among_blocks_and_missing_weights_are_refused(folder, tmp_path):
    found = load_file(folder / "transformer" / diffusers_folders.WEIGHTS)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(ValueError, match="block 1 has another timestep_embedder.linear_1.bias than block 0"):
        diffusers_dit.from_diffusers({**found, name: found[name] + 1}, SHAPE)
    shutil.copytree(folder / "transformer", tmp_path / "dit")
    file = tmp_path / "dit" / diffusers_folders.WEIGHTS
    save_file({key: value for key, value in found.items() if key != name}, file)
    with pytest.raises(ValueError, match=f"{file}: does not hold {name}, expected the weights of a DiTTransformer2DM"):
        diffusers_folders.read(tmp_path / "dit", {})


def test_a_network_that_diffusers_does_not_have_is_refused():
    with pytest.raises(ValueError, match="mlp_ratio is 2.0, and DiTTransformer2DModel has 4 alone"):
        diffusers_dit.config_of({**SHAPE, "mlp_ratio": 2.0})


def test_an_exported_state_is_a_pipeline_and_comes_back_by_import(model, tmp_path):
    weights = {name: value.float() for name, value in model.state_dict().items()}
    torch.save(weights, tmp_path / "mine.pt")
    told = ["--layout", "DiT", "--heads", "4"]
    out, back = tmp_path / "pipeline", tmp_path / "back.safetensors"
    assert cli.main(["export", str(tmp_path / "mine.pt"), str(out), "--format", "diffusers", *told]) == 0
    assert cli.main(["import", str(out), str(back)]) == 0
    found = open_weights(back)
    assert found.layout == "ours" and found.shape == {**SHAPE, "architecture": "dit"}
    assert all(torch.equal(found.weights["ema"][name], value) for name, value in weights.items())
    assert isinstance(found.model(), DiT)
    again = tmp_path / "again"
    assert cli.main(["export", str(back), str(again), "--format", "diffusers"]) == 0
    one, two = (load_file(folder / "transformer" / diffusers_folders.WEIGHTS) for folder in (out, again))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_what_cannot_go_out_or_come_in_is_refused_in_a_line(tmp_path, capsys):
    sit = SiT(**SHAPE)
    torch.save(sit.state_dict(), tmp_path / "sit.pt")
    out = str(tmp_path / "out")
    assert cli.main(["export", str(tmp_path / "sit.pt"), out, "--format", "diffusers", "--heads", "4"]) == 2
    assert "not a DiT or MM-DiT; diffusers has none" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["import", str(tmp_path / "empty"), f"{out}.safetensors"]) == 2
    assert "found a folder" in capsys.readouterr().err
