"""Weights files of public networks, from the hub or its cache, and timm's vision transformers.

Files are read without running code from them. timm is imported only when it is needed, because that takes seconds.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from haste.networks import tensors, text
from haste.networks.encoders import encoder_in
from haste.networks.weights import check_transformer

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

log = logging.getLogger("haste.networks")

SECONDS = 10.0  # of silence before a download is abandoned


def cached(url: str, hash_prefix: str | None = None) -> Path:
    """A file of torch's cache (`torch.hub`), downloaded if it is missing.

    Args:
        url: its address; the last part names it in the cache.
        hash_prefix: first digits of its sha256, checked after a download.

    Raises:
        OSError, RuntimeError: it cannot be fetched, or is not the expected file.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _patience(SECONDS):
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hash_prefix, progress=False)
    return path


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Time out connections that are silent for this long: torch's download itself has no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def from_hub(ask: Callable[..., str], whole: Callable[[Path], bool] = Path.exists) -> Path:
    """A file from the hub's cache, otherwise from the hub, if it answers at all.

    Where a network drops packets, the hub's own client retries for minutes.

    Args:
        ask: the client's function, its other arguments filled in.
        whole: whether what was found in the cache is complete.

    Raises:
        OSError, ValueError: the hub does not answer, or does not have it.
    """
    from huggingface_hub import constants

    with contextlib.suppress(OSError, ValueError):  # not in the cache
        if whole(found := Path(ask(local_files_only=True))):
            return found
    if not constants.HF_HUB_OFFLINE and (silence := _silence(constants.ENDPOINT, int(time.monotonic() / 60))):
        raise silence
    return Path(ask())


def text_folder(where: str | Path, called: str) -> Path:
    """The folder of a text encoder or a CLIP: `where` itself, or the hub's cache after a download of `text.PATTERNS`.

    Args:
        where: a folder, a hub id, or `ID@REVISION`.
        called: what messages call it.

    Raises:
        ValueError: neither a folder nor a hub id that can be reached or is cached.
    """
    if (folder := text.folder_named(where)) is not None:
        return folder
    from huggingface_hub import snapshot_download  # a network client, only for hub ids

    def whole(folder: Path) -> bool:
        return any(folder.glob("model*.safetensors")) and (folder / text.CONFIG).is_file()

    of, _, revision = str(where).partition("@")
    try:
        return from_hub(partial(snapshot_download, of, revision=revision or None, allow_patterns=text.PATTERNS), whole)
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{called} {where}: not a folder, and not available from the hub ({first}). {text.HINT}."
        ) from error


def from_transformers(classes: str, folder: Path, called: str, weights: Path) -> tuple[Any, Any]:
    """A network of transformers in float32 on the CPU, and its tokenizer, from a folder; code in it is never run.

    Args:
        classes: name of the class in transformers.
        folder: as transformers writes it.
        called: what messages call it.
        weights: one of its files of weights, for messages.

    Raises:
        ValueError: it cannot be loaded, or weights are missing or not finite.
    """
    import transformers  # takes seconds

    # Loading half of a CLIP lists the other half as unexpected; what is missing is refused here.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
        model, info = getattr(transformers, classes).from_pretrained(
            str(folder), use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except Exception as error:  # of many classes, for one damaged file
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: cannot be loaded as a {called} ({first})") from error
    if missing := sorted(info["missing_keys"]):  # transformers only warns, and leaves them random
        raise ValueError(f"{folder}: the weights lack {', '.join(missing[:4])}")
    finite(weights, model.state_dict())
    return model.eval().requires_grad_(False), tokenizer


@functools.lru_cache(1)  # who wants several files waits once; later it may be over
def _silence(url: str, minute: int) -> OSError | None:
    """Why nobody answers within SECONDS, asked once a minute; None if somebody does."""
    asked = urllib.request.Request(url, method="HEAD")
    try:
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(asked, timeout=SECONDS):
            pass
    except OSError as error:
        return error
    return None


def finite(path: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a file, checked to be finite.

    Raises:
        ValueError: NaN or infinity; the message names the file and the weight.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{path}: the weights {name} are not finite, expected numbers")
    return weights


def timm_weights(timm_name: str, called: str) -> Path:
    """The weights of one of timm's networks in the hub's local cache, fetched if they are missing.

    Args:
        timm_name: its name in timm.
        called: its name in messages, such as "teacher DINOv2-B".

    Raises:
        ValueError: the weights are not in the cache and cannot be fetched.
    """
    import timm
    from huggingface_hub import constants, hf_hub_download

    source = timm.get_pretrained_cfg(timm_name)
    assert source is not None
    try:
        if source.hf_hub_id:
            return from_hub(partial(hf_hub_download, source.hf_hub_id, "model.safetensors"))
        return cached(cast(str, source.url))
    except (OSError, ValueError, RuntimeError) as error:  # the hub's and urllib's errors are OSErrors
        where, file = source.hf_hub_id or source.url, "model.safetensors" if source.hf_hub_id else "that file"
        why = "HF_HUB_OFFLINE forbids it" if constants.HF_HUB_OFFLINE else type(error).__name__
        raise ValueError(
            f"{called}: its weights ({where}) are not on this machine and could not be fetched "
            f"({why}). Give a local file as its weights ({file} from there), or fetch them "
            "where there is a network."
        ) from error


def timm_transformer(timm_name: str, weights: Path, called: str, **options: Any) -> VisionTransformer:
    """One of timm's vision transformers with the weights of a file.

    Files are in timm's layout or the authors' (`haste.networks.encoders`). timm's own loader resamples the position
    embedding (antialiased bicubic) if the input size differs from the file's.

    Args:
        timm_name: its name in timm.
        weights: a file, safetensors or torch's own format.
        called: its name in messages.
        options: differences from timm's architecture.

    Raises:
        ValueError: no such file, or it does not hold these weights.
    """
    import timm

    check_transformer(weights, called, None)
    state = None if weights.suffix in (".npz", ".npy") else _state(weights, called, timm_name)
    source = {"file": str(weights)} if state is None else {"state_dict": state}
    try:
        network = timm.create_model(timm_name, pretrained=True, pretrained_cfg_overlay=source, num_classes=0, **options)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{weights}: these are not weights of {called} ({timm_name}): {error}") from error
    cast(Any, network).pretrained_cfg.pop("state_dict", None)  # it would stay in memory
    if state is not None and (wrong := _left_over(network, state)):
        raise ValueError(f"{weights}: these are not weights of {called} ({timm_name}): {wrong}")
    finite(Path(weights), network.state_dict())
    return cast("VisionTransformer", network)


def _state(weights: Path, called: str, timm_name: str) -> Any:
    """The weights of the encoder within a file; what else is in it is logged."""
    from timm.models import clean_state_dict

    held = tensors.read(weights, f"the weights of {called}")
    try:
        found = encoder_in(held)
    except ValueError as error:
        raise ValueError(f"{weights}: {error} of {called}") from error
    if found is None:  # chosen as timm's own loader does, which reads no NumPy beside them
        places = (name for name in ("state_dict_ema", "model_ema", "state_dict", "model") if held.get(name) is not None)
        return clean_state_dict(held[name] if (name := next(places, None)) else held)
    state, unused = found
    if unused:
        log.info("%s: of this file %s does not use %s", weights, called, ", ".join(unused))
    return _without_biases(weights, state) if "storage_tokens" in state and "qkvb" not in timm_name else state


def _without_biases(weights: Path, state: dict[str, Any]) -> dict[str, Any]:
    """DINOv3's own files without the biases of queries, keys and values, for which timm's networks have no place.

    In the published ones they are zero; those of the keys are masked.
    """
    biases = {name: value for name, value in state.items() if name.endswith(".attn.qkv.bias")}
    for name, value in biases.items():
        queries, _, values = value.chunk(3)
        if bool(queries.any() or values.any()):
            raise ValueError(f"{weights}: {name} is not zero: expected a network with such biases, as timm's ..._qkvb")
    return {name: value for name, value in state.items() if name not in biases}


def _left_over(network: Any, state: dict[str, Any]) -> str:
    """Weights of a network that a file lacks, and of the file that the network lacks, in words.

    If timm defines the network with a classifier, which is not built here, its loader accepts any file and leaves
    missing weights random.
    """
    known = network.pretrained_cfg
    if not known.get("num_classes"):
        return ""
    convert = sys.modules[type(network).__module__].checkpoint_filter_fn  # VisionTransformer's or Eva's
    found = convert(state, network).keys()
    heads = (f"{known.get('classifier') or 'head'}.{part}" for part in ("weight", "bias"))
    sides = {
        "missing": network.state_dict().keys() - found,
        "not known": found - network.state_dict().keys() - {*heads},
    }
    return "; ".join(f"{what}: {', '.join(sorted(names)[:4])}" for what, names in sides.items() if names)
