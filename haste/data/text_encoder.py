"""A frozen text encoder of transformers: from texts to the states of their tokens.

Shapes: N texts, L tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste.files.artefact import file_identity
from haste.networks import hub, text

BATCH = 64  # texts that are encoded at once


def fetch(where: str | Path) -> Path:
    """The folder of a text encoder: `where` itself, or the hub's cache after a download of `text.PATTERNS`.

    Raises:
        ValueError: neither a folder nor a hub id that can be reached or is cached.
    """
    if (folder := text.folder_named(where)) is not None:
        return folder
    from huggingface_hub import snapshot_download  # a network client, only for hub ids

    try:
        return hub.from_hub(partial(snapshot_download, str(where), allow_patterns=text.PATTERNS), _is_whole)
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"text encoder {where}: not a folder, and not to be had from the hub ({first}). {text.HINT}."
        ) from error


def _is_whole(folder: Path) -> bool:
    return any(folder.glob("model*.safetensors")) and (folder / text.CONFIG).is_file()


def _quiet() -> None:
    """Loading half of a CLIP makes transformers list the other half as unexpected; what is missing is refused here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class TextEncoder:
    """The last hidden state of a text encoder, after its final norm, of every token. Make one with `load`.

    Attributes:
        identities: of weights and tokenizer, sha256.
    """

    def __init__(self, model: Any, tokenizer: Any, identities: dict[str, str], *, tokens: int, masked: bool):
        self._model, self._tokenizer, self.identities = model, tokenizer, identities
        self._tokens, self._masked = tokens, masked

    @classmethod
    def load(cls, where: str | Path, *, tokens: int, width: int, masked: bool, device: str = "cpu") -> TextEncoder:
        """Load weights and tokenizer from a folder as transformers writes it, or by hub id, in float32.

        Args:
            where: folder, or a hub id such as "openai/clip-vit-large-patch14"; of a CLIP the text half is loaded.
            tokens: L; shorter texts are padded and longer ones cut.
            width: W, as the configuration says it.
            masked: whether attention leaves out padding; CLIP's published use in MM-DiT does not.
            device: torch's name of the device.

        Raises:
            ValueError: not found, not a text encoder, or one of another size.
        """
        found = text.opened(fetch(where))
        text.check(found, tokens=tokens, width=width)
        # Importing transformers takes seconds.
        from transformers import AutoModelForTextEncoding, AutoTokenizer, CLIPTextModel

        kind: Any = CLIPTextModel if found.kind in ("clip", "clip_text_model") else AutoModelForTextEncoding
        try:
            _quiet()
            tokenizer = AutoTokenizer.from_pretrained(str(found.folder), local_files_only=True, trust_remote_code=False)
            model, info = kind.from_pretrained(
                str(found.folder),
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except Exception as error:  # of many classes, for one damaged file
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{found.folder}: cannot be loaded as a text encoder ({first})") from error
        if missing := sorted(info["missing_keys"]):  # transformers only warns, and leaves them random
            raise ValueError(f"{found.folder}: the weights lack {', '.join(missing[:4])}")
        hub.finite(found.files[0], model.state_dict())
        if tokenizer.pad_token is None:
            raise ValueError(f"{found.folder}: the tokenizer has no padding token, expected one")
        model = model.to(device).eval().requires_grad_(False)
        return cls(model, tokenizer, found.identities(file_identity), tokens=tokens, masked=masked)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """States (N, L, W) float16.

        Raises:
            ValueError: a state that is not finite in float16.
        """
        parts = [self._encoded(list(texts[low : low + BATCH])) for low in range(0, len(texts), BATCH)]
        return np.concatenate(parts)

    def _encoded(self, texts: list[str]) -> np.ndarray:
        cut = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._tokens, return_tensors="pt"
        )
        mask = {"attention_mask": cut["attention_mask"].to(self._model.device)} if self._masked else {}
        # (N, L, W)
        states = self._model(input_ids=cut["input_ids"].to(self._model.device), **mask).last_hidden_state.half().cpu()
        if len(broken := (~states.flatten(1).isfinite().all(dim=1)).nonzero()):
            raise ValueError(f"the states of the text {texts[int(broken[0, 0])][:80]!r} are not finite in float16")
        return states.numpy()
