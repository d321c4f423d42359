"""A public text encoder before it is loaded: folder, size, files of weights and of its tokenizer. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from haste.networks import headers

CONFIG = "config.json"
USUAL = "openai/clip-vit-large-patch14"  # the encoder of the published MM-DiT, and the CLIP of CLIP scores
WORDS = "words"  # the encoder that needs no weights; see `haste.data.words`
#: Files that decide how a text is cut into tokens, as transformers keeps them.
TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt"),
)
#: What is downloaded of a hub's repository: no pickles, so nothing that could run code.
PATTERNS = [CONFIG, "model*.safetensors", "model.safetensors.index.json", *TOKENIZER]
HINT = "Give a folder as save_pretrained of transformers writes it, with its tokenizer, or fetch it where it can be"


@dataclass(frozen=True)
class Found:
    """A text encoder's folder.

    kind: its model_type; width: of its states, None where only loading tells; most: the tokens that it has positions
    for, None for any number; files: of its weights; tokenizer: of its tokenizer.
    """

    folder: Path
    kind: str
    width: int | None
    most: int | None
    files: list[Path]
    tokenizer: list[Path]

    def identities(self, identity: Callable[[Path], str]) -> dict[str, str]:
        """What weights and tokenizer are: name -> sha256 over the `identity` of each of their files."""
        parts = {"text encoder": self.files, "tokenizer": self.tokenizer}
        return {name: _together({file.name: identity(file) for file in files}) for name, files in parts.items()}


def _together(found: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def folder_named(where: str | Path) -> Path | None:
    """The folder that a configuration names; None for a hub id, which a revision may follow: `ID@REVISION`.

    Raises:
        ValueError: a file, or a path at which there is nothing.
    """
    folder = Path(where)
    if folder.is_dir():
        return folder
    if folder.is_file() or folder.is_absolute() or str(where).startswith(".") or str(where).count("/") != 1:
        found = "a file" if folder.is_file() else "no such folder"
        raise headers.MissingError(
            f"text encoder {where}: found {found}. {HINT}, or have one trained here (`encoder: {{trained: ...}}`)."
        )
    return None


def opened(folder: Path) -> Found:
    """What a folder holds.

    Raises:
        ValueError: no text encoder of transformers with its tokenizer; the message says what is missing.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        kind, inner = config["model_type"], config.get("text_config", config)
        width, most = inner.get("hidden_size", inner.get("d_model")), inner.get("max_position_embeddings")
        most = None if most is None else int(most)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path}: expected a configuration of transformers ({type(error).__name__}). {HINT}."
        ) from error
    if kind in ("clip", "clip_text_model"):  # transformers' defaults, which its files may leave out
        width, most = width or 512, most or 77
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: found no model.safetensors; pickled weights (.bin) are not loaded. {HINT}.")
    tokenizer = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    if not {"tokenizer.json", "vocab.json", "spiece.model", "vocab.txt"} & {file.name for file in tokenizer}:
        raise ValueError(f"{folder}: found no tokenizer, expected tokenizer.json or vocab.json and merges.txt. {HINT}.")
    return Found(folder, str(kind), width, most, files, tokenizer)


def check(found: Found, *, tokens: int, width: int) -> None:
    """Refuse an encoder that does not give what a configuration's `condition` says.

    Raises:
        ValueError: another width, fewer positions, or weights of another width.
    """
    if found.width is not None and found.width != width:
        raise ValueError(f"condition.width: {width}, but the states of {found.folder} have {found.width}")
    if found.most is not None and tokens > found.most:
        raise ValueError(f"condition.tokens: {tokens}, but {found.folder} has positions for {found.most}")
    for file in found.files:
        held: Any = headers.contents(file, "the weights of a text encoder")[0]
        name = next((name for name in held if name.endswith("text_model.embeddings.token_embedding.weight")), None)
        if name is not None and held[name].shape[-1] != width:
            raise ValueError(f"{file}: {name} is {tuple(held[name].shape)}, expected a width of {width}")
