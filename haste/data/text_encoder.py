"""A frozen text encoder of transformers: from texts to the states of their tokens.

Shapes: N texts, L tokens, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste.files.artefact import file_identity
from haste.networks import hub, text

BATCH = 64  # texts that are encoded at once


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
        found = text.opened(hub.text_folder(where, "text encoder"))
        text.check(found, tokens=tokens, width=width)
        kind = "CLIPTextModel" if found.kind in ("clip", "clip_text_model") else "AutoModelForTextEncoding"
        model, tokenizer = hub.from_transformers(kind, found.folder, "text encoder", found.files[0])
        if tokenizer.pad_token is None:
            raise ValueError(f"{found.folder}: the tokenizer has no padding token, expected one")
        return cls(model.to(device), tokenizer, found.identities(file_identity), tokens=tokens, masked=masked)

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
