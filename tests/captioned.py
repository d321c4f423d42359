"""What tests of captions share: a small CLIP in the public format, and a network that is told a caption."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from haste.config import Positive, Strict
from haste.models.denoiser import Denoiser
from haste.models.layers import timestep_features
from haste.networks.spec import Tap

TOKENS, WIDTH = 9, 8


class Says(Denoiser):
    condition = "captions"

    class Settings(Strict):
        width: Positive

    def __init__(self, *, input_size, in_channels, text_tokens, text_width, width):
        super().__init__(input_size=input_size, in_channels=in_channels)
        self.taps = {"tokens.1": Tap((input_size, input_size), width)}
        self.cells, self.about = nn.Conv2d(in_channels, width, 3, padding=1), nn.Linear(256 + text_width, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width)])
        self.out = nn.Conv2d(width, in_channels, 1)

    def forward(self, x, t, y, taps=()):
        about = self.about(torch.cat([timestep_features(t).to(y.dtype), y.mean(dim=1)], dim=1))
        hidden = functional.silu(self.cells(x) + about[:, :, None, None])
        tokens = functional.silu(self.blocks[0](hidden.flatten(2).mT))
        found = self.out(tokens.mT.unflatten(2, x.shape[2:]))
        return found, {"tokens.1": tokens} if "tokens.1" in taps else {}


def save_clip(folder: Path, seed: int = 0, **text: int) -> None:
    """A whole CLIP of random weights, as its authors' repository keeps it, with a tokenizer of a few merges."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    table = vocabulary()
    tokens = {"bos_token_id": len(table) - 2, "eos_token_id": len(table) - 1, "pad_token_id": len(table) - 1}
    words = {"vocab_size": len(table), "max_position_embeddings": TOKENS, **sizes, **tokens, **text}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=words, vision_config={"image_size": 8, "patch_size": 8, **sizes}))
    with torch.no_grad():  # the library's own are so small that all states are nearly equal
        for weight in model.parameters():
            weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(table))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{pair}\n" for pair in MERGES))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


MERGES = ["a t</w>", "c at</w>", "t h", "th r", "e e</w>", "thr ee</w>"]


def vocabulary() -> dict[str, int]:
    """Byte-level BPE: printable stand-ins of all bytes, each also at the end of a word, and what is merged."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = [chr(byte) for byte in seen] + [chr(256 + n) for n in range(256 - len(seen))]
    merged = ["".join(pair.split()) for pair in MERGES]
    known = [*stand_ins, *(letter + "</w>" for letter in stand_ins), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {word: place for place, word in enumerate(known)}
