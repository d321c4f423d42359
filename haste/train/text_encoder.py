"""The small text encoder that the pipeline trains itself: texts and pictures that belong together become alike.

As CLIP is trained (Radford et al. 2021, "Learning transferable visual models from natural language supervision"): a
text tower and an image tower, here a small vision transformer, each end in a vector, and within a batch the cosine of a
picture with its own caption is to be above those with all other captions, and the other way round. Captions that a
picture has too are not among its others. The image tower is dropped; the text tower is a causal transformer, written
as transformers writes it, with a tokenizer of the captions' own: bytes, and the words that pairs of them make (BPE).

M pictures, R their resolution, B batch, L tokens, W width, T different texts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from haste.files import artefact
from haste.train import small_networks

PAD, END = "<|pad|>", "<|end|>"
HOTTEST = math.log(100)  # the cosines' factor is learnt up to here, as published
MOST_JUDGED = 1000  # pictures that a caption chooses from when the encoder is judged


def train(
    images: NDArray[np.uint8],
    captions: Sequence[Sequence[str]],
    held_out: NDArray[np.uint8],
    held_out_captions: Sequence[Sequence[str]],
    *,
    out: Path,
    tokens: int,
    width: int,
    seed: int,
    steps: int,
    batch: int,
    lr: float,
    depth: int = 2,
    heads: int = 4,
    patch: int = 4,
    vocabulary: int = 1024,
    name: str = "text encoder",
    key: str | None = None,
    recipe: Any = None,
) -> dict[str, float]:
    """Train a small CLIPTextModel and its tokenizer, and write both as transformers does.

    Args:
        images, held_out: uint8 NHWC (M, R, R, 3); captions, held_out_captions: of each picture, at least one.
        out: the folder to write; an older one is replaced.
        tokens, width: L and W of the states.
        seed, steps, batch, lr: of the training.
        depth, heads: of both towers, whose width is W; patch: of the image tower, in pixels.
        vocabulary: the most tokens that the tokenizer knows, at least all bytes and two marks.
        name, key, recipe: recorded in `part.json`.

    Returns:
        Quality on `held_out`: "retrieval", the share of different captions whose nearest picture has them, and
        "retrieval_by_chance", the share that a picture taken at random would reach.

    Raises:
        ValueError: unsuitable images, heads or patch, or a loss that is not finite.
    """
    start, resolution = time.monotonic(), images.shape[1]
    if resolution % patch or width % heads:
        raise ValueError(f"{name}: patch {patch} must divide {resolution} px, and {heads} heads the width {width}")
    pixels, unseen = (small_networks.checked(one, f"{name}: images") for one in (images, held_out))
    tokenizer = learnt(captions, tokens, vocabulary)
    said = Said.by(captions, tokenizer)
    kwargs = small_networks.transformer_kwargs(resolution, width, depth=depth, width=width, heads=heads, patch=patch)
    seeing = small_networks.vision_transformer(seed, kwargs)
    with small_networks.initialising(seed):
        towers = Towers(_reader(tokenizer, tokens, width, depth, heads), seeing)

    def loss(indices: Tensor, generator: torch.Generator) -> Tensor:
        return towers.loss(pixels[indices], indices, said, generator)

    small_networks.fit(towers, loss, len(pixels), seed=seed, steps=steps, batch=batch, lr=lr, name=name)
    some = slice(None, None, -(-len(unseen) // MOST_JUDGED))
    quality = judged(towers, unseen[some], Said.by(held_out_captions[some], tokenizer))
    architecture = {"kind": "CLIPTextModel", "tokens": tokens, "width": width, "depth": depth, "heads": heads}
    with artefact.replacing(out) as folder:
        with artefact.saving_tensors(out):
            towers.reading.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        weights = folder / "model.safetensors"
        small_networks.describe(folder, weights, "text_encoder", name, key, recipe, architecture, quality, start)
    return quality


def learnt(captions: Iterable[Sequence[str]], tokens: int, vocabulary: int) -> Any:
    """A tokenizer of transformers whose tokens are bytes and what pairs of them make in these captions.

    Capitals are read as small letters. A text ends in `END` and is filled up with `PAD`; a longer one is cut. What the
    captions do not have is read byte by byte, so there is no unknown word.
    """
    import tokenizers as library  # comes with transformers, takes seconds
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    found = library.Tokenizer(models.BPE())
    found.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    found.train_from_iterator((text for texts in captions for text in texts), trainer)
    found.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token=PAD, eos_token=END, model_max_length=tokens)


def _reader(tokenizer: Any, tokens: int, width: int, depth: int, heads: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    sizes |= {"num_hidden_layers": depth, "num_attention_heads": heads}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": tokens}
    return CLIPTextModel(CLIPTextConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None))


@dataclasses.dataclass(frozen=True)
class Said:
    """Captions of M pictures, each text once.

    ids: tokens (T, L) int64; of: a picture's texts, (M, most captions) int64, -1 where it has no more; counts: (M,).
    """

    ids: Tensor
    of: Tensor
    counts: Tensor

    @classmethod
    def by(cls, captions: Sequence[Sequence[str]], tokenizer: Any) -> Said:
        """Those of each picture, cut into tokens."""
        numbers = {text: number for number, text in enumerate(dict.fromkeys(t for texts in captions for t in texts))}
        cut = tokenizer([*numbers], padding="max_length", truncation=True, return_tensors="pt")
        of = [torch.tensor([numbers[text] for text in texts]) for texts in captions]
        counts = torch.tensor([len(texts) for texts in captions])
        return cls(cut["input_ids"], nn.utils.rnn.pad_sequence(of, batch_first=True, padding_value=-1), counts)

    def have(self, pictures: Tensor, texts: Tensor) -> Tensor:
        """Which of some pictures (P,) have which of some texts (Q,): (P, Q) bool."""
        return (self.of[pictures][:, :, None] == texts).any(dim=1)


class Towers(nn.Module):
    """Both towers and the factor of their cosines."""

    def __init__(self, reading: Any, seeing: nn.Module):
        super().__init__()
        self.reading, self.seeing = reading, seeing
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as published

    def told(self, ids: Tensor) -> Tensor:
        """Tokens (B, L) -> unit vectors (B, W): the state of each text's end."""
        return functional.normalize(self.reading(input_ids=ids).pooler_output, dim=1)

    def seen(self, images: Tensor) -> Tensor:
        """uint8 NHWC -> unit vectors (B, W)."""
        return functional.normalize(self.seeing(small_networks.unit(images)), dim=1)

    def loss(self, images: Tensor, pictures: Tensor, said: Said, generator: torch.Generator) -> Tensor:
        """The mean of both cross-entropies of a batch, with a caption of each picture drawn at random.

        Args:
            images: (B, R, R, 3) uint8, of `pictures` (B,), their places in `said`.
        """
        drawn = (torch.rand(len(pictures), generator=generator) * said.counts[pictures]).long()
        texts = said.of[pictures, drawn]
        also = said.have(pictures, texts) & ~torch.eye(len(pictures), dtype=torch.bool)
        cosines = self.seen(images) @ self.told(said.ids[texts]).mT  # pictures x texts
        logits = (self.scale.clamp(max=HOTTEST).exp() * cosines).masked_fill(also, -torch.inf)
        own = torch.arange(len(pictures))
        return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.mT, own)) / 2


@torch.inference_mode()
def judged(towers: Towers, images: Tensor, said: Said) -> dict[str, float]:
    """How often the nearest picture (M, R, R, 3) of a text has it, and how often a picture at random has."""
    size = small_networks.EVALUATION_BATCH
    seen = torch.cat([towers.seen(part) for part in images.split(size)])
    nearest = torch.cat([(towers.told(part) @ seen.mT).argmax(dim=1) for part in said.ids.split(size)])
    having = said.have(torch.arange(len(images)), torch.arange(len(said.ids)))  # (M, T)
    right = having[nearest, torch.arange(len(said.ids))]
    return {"retrieval": float(right.double().mean()), "retrieval_by_chance": float(having.double().mean())}
