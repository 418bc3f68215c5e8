"""The small CLIP: a vision tower in transformers' format, a text encoder, and a captioner that reads the patches.

In: pixels (B, 3, 112, 112) normalised, caption ids. Out: losses, embeddings, captions. Training is in clip.py.
Contrast alone teaches a tower little about counts and letters, so that a captioner (thrown away afterwards) must also be
able to tell the whole caption from the patch features LLaVA will use: those after the last layer but one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

# B images, P patches, L caption tokens, V vision width, D text width, K kinds of photograph
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipSize:
    side: int = 112
    patch: int = 14
    width: int = 256
    layers: int = 8
    heads: int = 4
    mlp: int = 1024
    text_width: int = 256
    text_layers: int = 3
    caption_layers: int = 3
    embed: int = 256


def build_tower(size: ClipSize) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        image_size=size.side,
        patch_size=size.patch,
        projection_dim=size.embed,
        hidden_act="quick_gelu",
    )
    config._attn_implementation = "sdpa"
    return CLIPVisionModel(config)


def run_tower(tower: CLIPVisionModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features after the last layer but one (B, P, V), and the pooled class token (B, V).

    The layers are called one by one because asking for all hidden states does not compile well.
    """
    core = getattr(tower, "vision_model", tower)
    hidden = core.pre_layrnorm(core.embeddings(pixels))
    before = hidden
    for layer in core.encoder.layers:
        before = hidden
        out = layer(hidden, None)
        hidden = out[0] if isinstance(out, tuple) else out
    return before[:, 1:], core.post_layernorm(hidden[:, 0])


class Block(nn.Module):
    """Causal self-attention, cross-attention to patches where asked for, MLP; normalised before each."""

    def __init__(self, width: int, *, cross: int | None = None, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_self, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.cross = cross
        if cross:
            self.norm_cross, self.query = nn.LayerNorm(width), nn.Linear(width, width)
            self.key_value, self.cross_out = nn.Linear(cross, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        query, key, value = (self.split(t) for t in self.qkv(self.norm_self(x)).chunk(3, -1))
        x = x + self.out(join(F.scaled_dot_product_attention(query, key, value, is_causal=True)))
        if self.cross and patches is not None:
            query = self.split(self.query(self.norm_cross(x)))
            key, value = (self.split(t) for t in self.key_value(patches).chunk(2, -1))
            x = x + self.cross_out(join(F.scaled_dot_product_attention(query, key, value)))
        return x + self.mlp(self.norm_mlp(x))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class SmallClip(nn.Module):
    def __init__(self, size: ClipSize, vocab: int, max_length: int, num_kinds: int) -> None:
        super().__init__()
        self.tower = build_tower(size)
        self.embed = nn.Embedding(vocab, size.text_width)
        self.position = nn.Parameter(torch.randn(max_length, size.text_width) * 0.01)
        self.encoder = nn.ModuleList(Block(size.text_width) for _ in range(size.text_layers))
        self.captioner = nn.ModuleList(Block(size.text_width, cross=size.width) for _ in range(size.caption_layers))
        self.text_norm, self.caption_norm, self.patch_norm = (
            nn.LayerNorm(w) for w in (size.text_width, size.text_width, size.width)
        )
        self.image_head = nn.Linear(size.width, size.embed, bias=False)
        self.text_head = nn.Linear(size.text_width, size.embed, bias=False)
        self.kind_head = nn.Linear(size.width, num_kinds)
        self.log_scale = nn.Parameter(torch.tensor(2.66))
        nn.init.normal_(self.embed.weight, std=0.02)

    def embed_image(self, pooled: Tensor) -> Tensor:
        return F.normalize(self.image_head(pooled).float(), dim=-1)

    def encode_text(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.encoder:
            hidden = block(hidden)
        return hidden

    def embed_text(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """The state at each caption's last token."""
        last = (ids != 0).sum(1) - 1
        chosen = hidden[torch.arange(len(ids), device=ids.device), last]
        return F.normalize(self.text_head(self.text_norm(chosen)).float(), dim=-1)

    def caption_logits(self, hidden: Tensor, patches: Tensor) -> Tensor:
        patches = self.patch_norm(patches)
        for block in self.captioner:
            hidden = block(hidden, patches)
        return self.caption_norm(hidden) @ self.embed.weight.T

    def forward(self, pixels: Tensor, ids: Tensor, kind_ids: Tensor, soft: Tensor) -> dict[str, Tensor]:
        """Losses of one step. The first len(soft) images are photographs, the others go with the rows of `ids`.

        soft (B_photo, K): how much each photograph belongs to each kind; kind_ids (K, L'): one caption per kind.
        Every image is contrasted with all captions: those of the kinds and those of the drawn images.
        """
        num_photos = len(soft)
        patches, pooled = run_tower(self.tower, pixels)
        images = self.embed_image(pooled)
        hidden = self.encode_text(ids)
        captions = self.embed_text(hidden, ids)
        kinds = self.embed_text(self.encode_text(kind_ids), kind_ids)
        logits = images @ torch.cat([kinds, captions]).T * self.log_scale.exp().clamp(max=100)

        weights = torch.randint(1, 2**20, (ids.shape[1],), device=ids.device)
        key = (ids * weights).sum(1)  # equal captions are equally right
        same = (key[:, None] == key[None]).float()
        same = same / same.sum(1, keepdim=True)
        drawn_to_text = -(same * logits[num_photos:].log_softmax(-1)[:, len(kinds) :]).sum(1).mean()
        text_to_drawn = -(same * logits[num_photos:, len(kinds) :].T.log_softmax(-1)).sum(1).mean()
        photo_to_text = -(soft * logits[:num_photos].log_softmax(-1)[:, : len(kinds)]).sum(1).mean()

        guess = self.kind_head(self.patch_norm(patches[:num_photos]).mean(1)).float()
        kind_loss = -(soft * guess.log_softmax(-1)).sum(1).mean()

        words = self.caption_logits(hidden[:, :-1], patches[num_photos:]).float()
        target = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)
        caption_loss = F.cross_entropy(words.flatten(0, 1), target.flatten(), ignore_index=-100)
        return {
            "contrast": (drawn_to_text + text_to_drawn) / 2,
            "photo": photo_to_text,
            "kind": kind_loss,
            "caption": caption_loss,
        }

    @torch.no_grad()
    def write_captions(self, pixels: Tensor, start: Tensor, length: int) -> Tensor:
        """Greedy captions that begin with `start` (B, L0); no cache, for short checks only."""
        patches, _ = run_tower(self.tower, pixels)
        ids = start
        for _ in range(length):
            logits = self.caption_logits(self.encode_text(ids), patches)[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        return ids
