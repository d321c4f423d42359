"""What people hold for a checkpoint is named for what it is, with what to do."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from haste.models.checkpoints import read_checkpoint


def text(content):
    return lambda path: path.write_text(content)


def raw(content):
    return lambda path: path.write_bytes(content)


def saved(found):
    return lambda path: torch.save(found, path)


def names(*found):
    return lambda path: save_file({name: torch.ones(2, 2) for name in found}, path)


def packed(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/model.pt", b"x")


def folder(*files):
    def make(path):
        path.mkdir()
        for name in files:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).touch()

    return make


def scripted(path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(path))


def optimiser(path):
    torch.save(torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()).state_dict(), path)


FILES = {
    "git-lfs": (text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2701\n"), "git lfs pull"),
    "a web page": (
        text("\n<!DOCTYPE html><html><body>Sign in</body></html>"),
        "a web page: the download led to a page",
    ),
    "another web page": (text("<html lang='en'>"), "a web page"),
    "a server's refusal": (text("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"), "an XML page"),
    "an index": (text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})), "weights in 2 files"),
    "a configuration": (text(json.dumps({"_class_name": "DiTTransformer2DModel"})), "of DiTTransformer2DModel (JSON)"),
    "an empty file": (raw(b""), "an empty file"),
    "zeros": (raw(bytes(5000)), "begins with zeros"),
    "HDF5": (lambda path: h5py.File(path, "w").close(), "an HDF5 file, as Keras writes"),
    "NumPy": (lambda path: np.save(path.open("wb"), np.ones(2)), "one NumPy array"),
    "an npz": (lambda path: np.savez(path.open("wb"), a=np.ones(2)), "an .npz of NumPy arrays"),
    "gzip": (raw(gzip.compress(b"weights")), "a gzip archive: unpack it first"),
    "tar": (packed, "a tar archive: unpack it first"),
    "zip": (zipped, "a zip archive of weights/model.pt: unpack it first"),
    "half a download": (raw(b"PK\x03\x04" + bytes(range(200))), "a zip archive without its end"),
    "a pickle": (raw(pickle.dumps({"G_ema": [1]})), "a pickle that torch did not write"),
    "TensorFlow's list": (text('model_checkpoint_path: "model.ckpt-100"\n'), "TensorFlow's list of checkpoints"),
    "TensorFlow's table": (raw(b"\x00\x12xyz" * 9 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"), "of a TensorFlow checkpoint"),
    "GGUF": (raw(b"GGUF\x03" + bytes(40)), "a GGUF file"),
    "TorchScript": (scripted, "a TorchScript archive, which holds code"),
    "an optimiser": (optimiser, "the state of an optimiser alone"),
    "a whole network": (
        saved(torch.nn.Linear(2, 2)),
        "torch.nn.modules.linear.Linear, which could run code; that is a whole",
    ),
    "LoRA of peft": (names("base_model.model.blocks.0.attn.qkv.lora_A.weight"), "LoRA's updates of a network: merge"),
    "LoRA of kohya": (names("lora_unet_blocks_0_attn_qkv.lora_down.weight"), "LoRA's updates"),
    "an average": (saved({"decay": 0.9, "shadow_params": [torch.ones(2)]}), "an average without names"),
    "diffusers' DiT": (names("transformer_blocks.0.attn1.to_q.weight", "pos_embed.proj.weight"), "diffusers' layout"),
    "a U-Net": (saved({"state_dict": {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(2)}}), "a U-Net"),
    "an autoencoder": (names("encoder.conv_in.weight", "quant_conv.weight"), "the weights of an autoencoder"),
    "a teacher": (names("cls_token", "patch_embed.proj.weight"), "a vision transformer, as teachers are"),
    "Inception": (names("Conv2d_1a_3x3.conv.weight"), "the weights of Inception"),
    "tensors without names": (saved([torch.ones(2)]), "expected a dictionary of weights, found list"),
    "diffusers' pipeline": (folder("model_index.json", "vae/config.json"), "diffusers' pipeline"),
    "diffusers' network": (folder("config.json", "diffusion_pytorch_model.safetensors"), "diffusers' layout"),
    "sharded weights": (folder("model.safetensors.index.json", "model-1.safetensors"), "a folder of sharded weights"),
    "torch.distributed": (folder(".metadata", "__0_0.distcp"), "dcp_to_torch"),
    "DeepSpeed": (folder("mp_rank_00_model_states.pt"), "zero_to_fp32.py makes one file"),
    "an unpacked checkpoint": (folder("data.pkl", "data/0"), "an unpacked checkpoint"),
    "SavedModel": (folder("saved_model.pb"), "TensorFlow's SavedModel"),
    "states": (folder("trajectory.json", "step-00000008.safetensors"), "a folder of states: give one"),
    "a folder of checkpoints": (folder("a.pt", "b.pt"), "give one of its files, a.pt, b.pt"),
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_named_for_what_it_is(tmp_path, name):
    make, words = FILES[name]
    path = tmp_path / "given.pt"
    make(path)
    with pytest.raises(ValueError) as refusal:
        read_checkpoint(path)
    assert str(refusal.value).startswith(f"{path}: ") and words in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.ckpt.data-00000-of-00001", "a part of a TensorFlow checkpoint"),
        ("model.onnx", "an ONNX graph"),
        ("model.msgpack", "Flax's msgpack"),
        ("model.pt.crdownload", "an unfinished download"),
    ],
)
def test_what_its_bytes_do_not_say_its_name_may(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"\x08\x07some bytes")
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / name)
