"""The condition `captions`: each sample is told a text, as the states of its tokens by a frozen text encoder.

Shapes: N samples, L tokens, W width of the text encoder.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from haste.config import Sampling, Strict
from haste.config.keys import LABEL, Positive
from haste.config.parts import Encoder
from haste.data import order
from haste.data.condition import Condition, Rows
from haste.data.words import Words
from haste.files.store import Made, Store
from haste.files.texts import Texts
from haste.networks.text import USUAL, WORDS

if TYPE_CHECKING:
    from haste.data.text_encoder import TextEncoder
    from haste.plan.names import Artefact
    from haste.plan.plan import Plan

CAPTIONS = "captions"  # the identity of the texts themselves; others are of what encodes them
TEXT_BYTES = 1024  # of a sample's text that are kept beside it
_END = 0xFF  # fills them up; no byte of UTF-8


class Captions(Condition):
    """A caption. In a training step it is one of the image's, drawn anew at each visit; the null condition is the empty
    caption. Samples are told captions of a split's images in turn, or the prompts of their settings.

    Rows beside latents are those of labels, so that both conditions share them. Rows of samples are `caption`, an image
    and the number of its caption (-1 and the prompt's place for a prompt), and `text`, UTF-8.
    """

    class Settings(Strict):
        """Keys of `condition`; `cache` decides nothing but when the texts are encoded."""

        encoder: Encoder = USUAL
        tokens: Positive = 77
        width: Positive = 768
        attention_mask: bool = False
        cache: Annotated[bool, LABEL] = True

    def __init__(
        self, *, classes: int, encoder: Any, tokens: int, width: int, attention_mask: bool, cache: bool = True
    ):
        self.shape, self._masked, self._classes = (tokens, width), attention_mask, classes
        self.fields: Mapping[str, tuple[Sequence[int], DTypeLike]] = {
            "caption": ((2,), np.int64),
            "text": ((TEXT_BYTES,), np.uint8),
        }
        self.arguments = {"text_tokens": tokens, "text_width": width}
        self._where: str | None = encoder if isinstance(encoder, str) else None
        self._device = "cpu"
        self._part: Artefact | None = None  # the encoder that is trained here
        self._texts: Texts | None = None
        self._images: Made | None = None
        self._states: Store | None = None

    @property
    def stored(self) -> Mapping[str, tuple[Sequence[int], DTypeLike]]:
        """See `Condition`."""
        return {"label": ((), np.int64)}

    def rows(self, said: Rows) -> Rows:
        """See `Condition`."""
        return {"label": said["label"]}

    def opened(self, plan: Plan) -> Captions:
        """See `Condition`: with the texts of a plan's images and, unless these are made as needed, their states.

        Raises:
            ValueError: they are missing or damaged, or do not belong together.
        """
        found = self.on(plan)
        found._texts = Texts.of(plan.data.images)
        if plan.text is None:
            found._null  # noqa: B018 - before threads ask: the first text sets how the tokenizer cuts and pads
        else:
            found._states = Store.of(plan.text)
            if (sha256 := found._states.manifest["captions"]) != found._texts.sha256:
                raise ValueError(
                    f"{found._states.folder}: encoded from captions {sha256[:12]}, but {plan.data.images.folder} holds "
                    f"{found._texts.sha256[:12]}. Remove its manifest and shards: the workflow makes them again"
                )
        return found

    def on(self, plan: Plan) -> Captions:
        """See `Condition`: with the encoder that a plan names, on its device."""
        found = copy.copy(self)
        found._images = plan.data.images
        found._part, found._device = plan.text_encoder, _device(plan)
        named: Any = plan.config.condition.encoder
        found._where = found._part.folder if found._part else named
        return found

    @functools.cached_property
    def encoder(self) -> Words | TextEncoder:
        """The text encoder, loaded at its first use.

        Raises:
            ValueError: it cannot be had, or is not the one that made the states of captions.
        """
        tokens, width = self.shape
        if self._where == WORDS:
            return Words(tokens=tokens, width=width)
        if self._where is None:
            raise ValueError("the text encoder that is trained here lies in a plan's folder; call opened(plan) first")
        if self._part is not None and not Path(self._part.manifest).exists():
            raise ValueError(f"{self._part.folder}: no text encoder, expected the one that `haste text-encoder` trains")
        from haste.data.text_encoder import TextEncoder

        found = TextEncoder.load(self._where, tokens=tokens, width=width, masked=self._masked, device=self._device)
        made = found.identities if self._states is None else self._states.manifest["encoder"]
        if self._states is not None and (other := [name for name in made if made[name] != found.identities[name]]):
            raise ValueError(
                f"{self._states.folder}: encoded by the {other[0]} {made[other[0]][:12]}, but {self._where} holds "
                f"{found.identities[other[0]][:12]}. Put back what was there, or remove the store to encode anew"
            )
        return found

    @property
    def texts(self) -> Texts:
        """The captions of the images of a plan that this is `opened` or `on`."""
        if self._texts is None:
            if self._images is None:
                raise ValueError("captions are read before they are opened; call opened(plan) first")
            self._texts = Texts.of(self._images)
        return self._texts

    @property
    def identities(self) -> dict[str, str]:
        """See `Condition`: of the encoder's weights and its tokenizer and, once these are open, the captions."""
        made = self.encoder.identities if self._states is None else self._states.manifest["encoder"]
        return dict(made) if self._texts is None else {CAPTIONS: self._texts.sha256, **made}

    def told(self, rows: Rows) -> NDArray[np.float32]:
        """(N, L, W) float32, whose values float16 holds."""
        image, number = rows["caption"].T
        if self._states is None or not len(image) or image.min() < 0:
            return self._encoded(self.words(rows))
        return self._states.read("states", self.texts.first[image] + number).astype(np.float32)

    def null(self, count: int) -> NDArray[np.float32]:
        """The states of the empty caption, (count, L, W) float32."""
        return np.repeat(self._null[None], count, axis=0)

    @functools.cached_property
    def _null(self) -> NDArray[np.float32]:
        if self._states is None:
            return self._encoded([""])[0]
        return self._states.read("states", [self._states.count - 1])[0].astype(np.float32)

    def like(self, count: int) -> NDArray[np.float32]:
        """See `Condition`."""
        return np.zeros((count, *self.shape), np.float32)

    def _encoded(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.encoder(texts).astype(np.float32) if len(texts) else self.like(0)

    def batch(self, rows: Rows, *, seed: int, step: int, visits: Sequence[int], dropout: float) -> NDArray[np.float32]:
        """See `Condition`. Which of its captions an image is told follows from seed, step and visit."""
        told = self._drawn(rows["index"], order.uniforms(seed, "caption", step, visits))
        found = super().batch(told, seed=seed, step=step, visits=visits, dropout=dropout)
        assert isinstance(found, np.ndarray)
        return found

    def sampled(self, sampling: Sampling, indices: range) -> Rows:
        """Prompts in turn, or captions of a split's images in order, one of each, which follows from seed and i.

        Raises:
            ValueError: the split has no images.
        """
        turns = np.asarray(indices, np.int64)
        if sampling.prompts:
            numbers = turns % len(sampling.prompts)
            return _rows(np.full(len(turns), -1), numbers, [sampling.prompts[number] for number in numbers])
        images = self.texts.splits[sampling.split]
        if not len(images):
            why = "images.holdout is 0" if sampling.split == "held_out" else "there are no training images"
            raise ValueError(f"sampling.split: {sampling.split}, but {why}; expected another split, or prompts")
        chosen = images.start + turns % len(images)
        return self._drawn(chosen, order.uniforms(sampling.seed, "sample caption", 0, indices))

    def _drawn(self, images: NDArray[np.int64], uniforms: NDArray[np.float64]) -> Rows:
        """One caption of each image, as rows of samples."""
        numbers = (uniforms * self.texts.counts[images]).astype(np.int64)
        said = [self.texts.of_image(int(image))[number] for image, number in zip(images, numbers, strict=True)]
        return _rows(images, numbers, said)

    def words(self, rows: Rows) -> list[str]:
        """See `Condition`. A text that is longer than its row is read from the plan's captions, where there is one."""
        found = []
        for (image, number), kept in zip(rows["caption"].tolist(), rows["text"], strict=True):
            if image >= 0 and kept[-1] != _END and self._images is not None:
                found.append(self.texts.of_image(image)[number])
            else:
                found.append(kept[kept != _END].tobytes().decode(errors="ignore"))
        return found

    def meant(self, rows: Rows) -> NDArray[np.int64] | None:
        """See `Condition`: that of the image whose caption it is, in a plan that this is `opened` or `on`."""
        if not self._classes:
            return None
        image = rows["caption"][:, 0]
        found = np.full(len(image), -1, np.int64)
        if len(of := np.flatnonzero(image >= 0)):
            assert self._images is not None
            with Store.of(self._images) as store:
                found[of] = store.read("label", image[of])
        return found


def _rows(images: NDArray[np.int64], numbers: NDArray[np.int64], texts: Sequence[str]) -> dict[str, NDArray[Any]]:
    kept = np.full((len(texts), TEXT_BYTES), _END, np.uint8)
    for row, text in enumerate(texts):
        content = np.frombuffer(text.encode()[:TEXT_BYTES], np.uint8)
        kept[row, : len(content)] = content
    return {"caption": np.stack([images, numbers], axis=1).astype(np.int64), "text": kept}


def _device(plan: Plan) -> str:
    """The device of this process, by number: batches are made in threads, whose current one is the first."""
    from haste.networks.devices import choose_device  # imports torch

    device = choose_device(plan.config.runtime.device)
    if device.type != "cuda":
        return str(device)
    import torch

    return f"cuda:{torch.cuda.current_device()}"
