"""What people hold for a checkpoint and is none, in words, with what to do: files, folders, and sets of weights.

Only the beginnings and ends of files, names of files and names of weights are looked at. No torch.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

_STARTS = {
    b"version https://git-lfs": "a pointer of git-lfs in the place of the file: run `git lfs pull` where it was cloned",
    b"\x93NUMPY": "one NumPy array (.npy)",
    b"\x89HDF": "an HDF5 file, as Keras writes weights: expected PyTorch's",
    b"GGUF": "a GGUF file of quantised weights: take the file that it was made from",
    b"\x1f\x8b": "a gzip archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"BZh": "a bzip2 archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"(\xb5/\xfd": "a zstd archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"model_checkpoint_path:": "TensorFlow's list of checkpoints: expected PyTorch's weights",
    b"<?xml": "an XML page, as a server answers when it refuses: download the file again",
}
_TENSORFLOW = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # ends the tables of its checkpoints
_SUFFIXES = {
    ".onnx": "an ONNX graph: expected PyTorch's weights",
    ".msgpack": "Flax's msgpack: expected PyTorch's weights",
    ".crdownload": "an unfinished download: wait for its end, or download it again",
    ".part": "an unfinished download or copy: wait for its end, or make it again",
    ".incomplete": "an unfinished download of the hub's: download it again",
    ".aria2": "the notes of an unfinished download: the file lies beside it",
}


def file(path: Path) -> str | None:
    """What a file is that could not be read as weights; None if nothing in it says so."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(1024)
        stream.seek(max(0, size - 8))
        end = stream.read(8)
    if not start:
        return "an empty file: it was not written, or the disk was full"
    if any(not byte for byte in (start, start.strip(b"\0"))):
        return "a file that begins with zeros: it was not written to its end"
    if words := next((words for mark, words in _STARTS.items() if start.startswith(mark)), None):
        return words
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if re.match(rb"\s*<(!doctype|html|head)", start, re.IGNORECASE):
        return "a web page: the download led to a page (to sign in, or of an error), download the file itself"
    if end == _TENSORFLOW or re.search(r"\.(data-\d+-of-\d+|index|meta|pb)$", path.name):
        return "a part of a TensorFlow checkpoint: expected PyTorch's weights"
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if start.startswith(b"PK"):
        return _zip(path)
    if start.lstrip()[:1] in (b"{", b"["):
        return _json(path)
    if start[0] == 0x80 and start[1:2] in b"\2\3\4\5":
        return (
            "a truncated file, or a pickle that torch did not write (as EDM's and StyleGAN's .pkl): it could run code, "
            "so save its weights alone with a program that you trust with it"
        )
    return None


def _zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # a damaged directory raises errors of all kinds
        return "a truncated file: a zip archive without its end, as a download or copy leaves that broke off"
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last and any("code/" in name for name in names):
        return "a TorchScript archive, which holds code: save the state_dict() of the module instead"
    if names and all(name.endswith(".npy") for name in names):
        return "an .npz of NumPy arrays: expected PyTorch's weights"
    if "data.pkl" in last:
        return None
    return f"a zip archive of {', '.join(names[:3]) or 'nothing'}{', ...' if len(names) > 3 else ''}: unpack it first"


def _json(path: Path) -> str:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return "text, not weights"
    if isinstance(held, dict) and "weight_map" in held:
        return (
            f"the index of weights in {len({*map(str, dict(held['weight_map']).values())})} files: load these into one "
            "dictionary and save it as one .safetensors"
        )
    kind = held.get("_class_name") if isinstance(held, dict) else None
    return f"the configuration of {kind or 'something'} (JSON), without its weights"


def folder(path: Path) -> str:
    """What a folder is that was given for a checkpoint."""
    names = sorted(one.name for one in path.iterdir())
    if "model_index.json" in names:
        return "a folder: diffusers' pipeline. Its networks lie in folders of their own"
    if any(name.endswith(".index.json") for name in names):
        return "a folder of sharded weights: load all of its files into one dictionary and save it as one .safetensors"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return (
            "a folder: a checkpoint of torch.distributed. `python -m torch.distributed.checkpoint.format_utils "
            "dcp_to_torch FOLDER FILE` makes one file of it"
        )
    if any(re.search(r"(mp_rank_\d+_model|zero_pp_rank.*_optim)_states\.pt$", name) for name in names):
        return "a folder: a checkpoint of DeepSpeed. Its zero_to_fp32.py makes one file of it"
    if "data.pkl" in names or "archive" in names:
        return "a folder: an unpacked checkpoint. Give the file that it was before it was unpacked"
    if "saved_model.pb" in names:
        return "a folder: TensorFlow's SavedModel, expected PyTorch's weights"
    if "config.json" in names and any(name.startswith("diffusion_pytorch_model") for name in names):
        return "a folder: a network in diffusers' layout, whose names and architecture are others"
    if "trajectory.json" in names:
        return "a folder of states: give one, step-*.safetensors"
    files = [name for name in names if re.search(r"\.(pt|pth|ckpt|bin|safetensors)$", name)]
    return f"a folder{': give one of its files, ' + ', '.join(files[:4]) if files else ''}"


VISION = "the weights of a vision transformer, as teachers are"
# Names in a set of weights -> what it is. The first that fits.
_WEIGHTS = {
    r"\blora[._](A|B|up|down)\b|\.lora_|^lora_": "LoRA's updates of a network: merge them into its weights first",
    r"^(state|param_groups)$": "the state of an optimiser alone: the weights lie in another file",
    r"^shadow_params$": "an average without names (shadow_params): copy it into the network and save its state_dict()",
    r"\.norm1_context\.": "a joint text and image transformer of diffusers': give its folder, with its config.json",
    r"^joint_blocks\.|^context_embedder\.": "the weights of a joint text and image transformer",
    r"(^|\.)x_embedder\.proj\.weight$": "the weights of a diffusion transformer",
    r"^transformer_blocks\.0\.": "a transformer in diffusers' layout, whose names and timestep features are others",
    r"(^|\.)diffusion_model\.input_blocks\.|^input_blocks\.|^down_blocks\.0\.": "the weights of a U-Net",
    r"(^|\.)(quant_conv\.|decoder\.up|decoder\.mid)": "the weights of an autoencoder",
    r"(^|\.)Mixed_6d\.|^Conv2d_1a_3x3\.": "the weights of Inception",
    r"(^|\.)(patch_embed\.proj|visual\.conv1|cls_token)": VISION,
    r"^(text_model|text_encoder|encoder\.block)\.": "the weights of a text encoder",
}


def weights(names: Iterable[str]) -> str | None:
    """What a set of weights, or a dictionary, is by the names in it; None if they do not say."""
    names = list(names)
    return next((words for pattern, words in _WEIGHTS.items() if any(re.search(pattern, n) for n in names)), None)
