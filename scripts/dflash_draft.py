"""A DFlash draft in plain torch: the model, the blocks it is trained on, and its loss.

After "DFlash: Block Diffusion for Flash Speculative Decoding" (arXiv 2602.06036, sections 4.1 and 4.2). A block is one
real token, the *anchor*, followed by ``block_size - 1`` MASK tokens; the draft fills all of them in one pass. It sees
the target's hidden states at positions strictly before the anchor (while decoding, the target has chosen the anchor
but has not run on it yet) and, in both directions, the tokens of its own block. Token embedding and LM head are the
target's own, frozen. Nothing here knows whether the hidden states come from a cache or from a target.

Shapes: B samples, S tokens, L captured layers of width H, N blocks a sample, K tokens a block, V entries in the
vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cache_format import DFlashTargetBatch


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """Everything but the weights."""

    hidden_size: int
    """H, the target's"""
    target_layer_ids: tuple[int, ...]
    """the captured layers, in the order of the features"""
    mask_token_id: int
    """a token that does not occur in the data"""
    num_layers: int
    num_heads: int
    block_size: int = 8
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}; an anchor and one MASK make at least 2")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads of even width"
            )


class Draft(nn.Module):
    """A stack of layers over blocks of tokens; each layer also attends to the target's fused hidden states."""

    def __init__(self, config: DraftConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.fuse = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.fuse_norm = nn.RMSNorm(width, eps=1e-6)
        self.layers = nn.ModuleList(DraftLayer(width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, hidden_states: Tensor, blocks: Tensor, anchors: Tensor) -> Tensor:
        """Features for the LM head, at every token of every block.

        Args:
            hidden_states: ``[B, S, L*H]`` of the target, any float dtype.
            blocks: ``[B, N*K, H]`` embedded tokens, block after block.
            anchors: ``[B, N]`` position of each block's first token; it sees hidden states before that.

        Returns:
            ``[B, N*K, H]``
        """
        size, length = self.config.block_size, hidden_states.shape[1]
        context = self.fuse_norm(self.fuse(hidden_states.to(self.fuse.weight.dtype)))
        visible = visible_to_blocks(anchors, length, size)
        in_context = torch.arange(length, device=anchors.device).expand(len(anchors), length)
        in_blocks = (anchors[:, :, None] + torch.arange(size, device=anchors.device)).flatten(1)
        rotation = _rotation(torch.cat([in_context, in_blocks], dim=1), self.layers[0].head_dim, self.config.rope_theta)
        x = blocks.to(context.dtype)
        for layer in self.layers:
            x = layer(x, context, visible, rotation)
        return self.norm(x)

    @torch.no_grad()
    def propose(self, hidden_states: Tensor, anchor_token: int, embed: nn.Module, head: nn.Module) -> Tensor:
        """The ``[K-1]`` tokens that follow ``anchor_token``, given ``[1, S, L*H]`` of all tokens before it."""
        ids = torch.full((1, self.config.block_size), self.config.mask_token_id, device=hidden_states.device)
        ids[0, 0] = anchor_token
        anchors = torch.tensor([[hidden_states.shape[1]]], device=hidden_states.device)
        return _logits(head, self(hidden_states, embed(ids), anchors)[0, 1:]).argmax(-1)

    def save(self, folder: Path) -> None:
        """Write ``draft.json`` and ``draft.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "draft.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "draft.safetensors"
        )

    @classmethod
    def load(cls, folder: Path) -> Draft:
        """What :meth:`save` wrote, on the CPU."""
        fields = json.loads((folder / "draft.json").read_text(encoding="utf-8"))
        fields["target_layer_ids"] = tuple(fields["target_layer_ids"])
        draft = cls(DraftConfig(**fields))
        draft.load_state_dict(load_file(folder / "draft.safetensors"))
        return draft


class DraftLayer(nn.Module):
    """Attention from the blocks to context and blocks, then a gated MLP; norms and biases as in Qwen3."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6), nn.RMSNorm(self.head_dim, eps=1e-6)
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, context: Tensor, visible: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """``x [B, N*K, H]``, ``context [B, S, H]``, ``visible [B, N*K, S+N*K]`` -> ``[B, N*K, H]``."""
        normed = self.attention_norm(x)
        both = torch.cat([context, normed], dim=1)
        queries = _rotate(self.q_norm(self._heads(self.q(normed))), rotation)
        keys = _rotate(self.k_norm(self._heads(self.k(both))), rotation)
        values = self._heads(self.v(both))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible[:, None])
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def visible_to_blocks(anchors: Tensor, length: int, block_size: int) -> Tensor:
    """Bool ``[B, N*K, S + N*K]``: which context positions and block tokens each block token attends to.

    The context before its own anchor, all of its own block, nothing else; other blocks would leak the answer.
    """
    num_blocks = anchors.shape[1]
    anchor_of = anchors.repeat_interleave(block_size, dim=1)
    block_of = torch.arange(num_blocks, device=anchors.device).repeat_interleave(block_size)
    before = torch.arange(length, device=anchors.device) < anchor_of[:, :, None]
    same_block = (block_of[:, None] == block_of).expand(len(anchors), -1, -1)
    return torch.cat([before, same_block], dim=-1)


def sample_anchors(loss_mask: Tensor, num_blocks: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw up to ``num_blocks`` anchors a sample, among learned tokens that a learned token follows.

    Args:
        loss_mask: ``[B, S]`` int64.
        num_blocks: N; samples with fewer candidates get blocks that do not count.
        generator: a CPU generator, so that a seed gives the same anchors on every device.

    Returns:
        anchors ``[B, N]`` int64, and bool ``[B, N]``: which of them count.
    """
    candidates = F.pad(loss_mask[:, :-1] * loss_mask[:, 1:], (0, 1)).cpu()
    scores = torch.rand(candidates.shape, generator=generator) + candidates
    best = scores.topk(min(num_blocks, scores.shape[1]), dim=1)
    keep = best.values >= 1
    return (best.indices * keep).to(loss_mask.device), keep.to(loss_mask.device)


def block_loss(
    draft: Draft,
    embed: nn.Module,
    head: nn.Module,
    batch: DFlashTargetBatch,
    anchors: Tensor,
    keep: Tensor,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the blocks' MASK tokens, weighted ``exp(-(k-1) / gamma)`` at the k-th after the anchor.

    An early mistake makes the rest of a block worthless, hence the decay (Eq. 4 of the paper). Tokens from the first
    unlearned one on (end of the answer, padding) do not count.

    Returns:
        the weighted mean loss, and the share of right tokens, both scalars. Zeros (and gradients of zero) for a batch
        in which no learned token follows another.
    """
    size, length = draft.config.block_size, batch.input_ids.shape[1]
    at = anchors[:, :, None] + torch.arange(size, device=anchors.device)
    inside, at = at < length, at.clamp(max=length - 1)
    ids, learned = (x.gather(1, at.flatten(1)).view_as(at) for x in (batch.input_ids, batch.loss_mask))
    counted = (learned.bool() & inside & keep[:, :, None])[:, :, 1:].cumprod(dim=-1).bool()

    masked = ids.clone()
    masked[:, :, 1:] = draft.config.mask_token_id
    features = draft(batch.hidden_states, embed(masked.flatten(1)), anchors)
    logits = _logits(head, features.view(*at.shape, -1)[:, :, 1:][counted])
    labels = ids[:, :, 1:][counted]
    decay = torch.exp(-torch.arange(size - 1, device=at.device) / gamma).expand_as(counted)[counted]
    losses = F.cross_entropy(logits, labels, reduction="none")
    right = (logits.argmax(-1) == labels).sum() / counted.sum().clamp_min(1)
    # A block that counts has a token of weight 1, so 1 is the least unless nothing counts.
    return (losses * decay).sum() / decay.sum().clamp_min(1), right


def _logits(head: nn.Module, features: Tensor) -> Tensor:
    """``[..., H]`` -> ``[..., V]`` float32; the head keeps the target's dtype."""
    return head(features.to(next(head.parameters()).dtype)).float()


def _rotation(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[B, 1, T, head_dim/2]`` of rotary position embedding at ``positions [B, T]``."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = (positions[:, :, None] * frequencies)[:, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the last ``T`` rotations to ``x [B, heads, T, head_dim]``: queries are the end of the keys."""
    cos, sin = (part[:, :, -x.shape[2] :].to(x.dtype) for part in rotation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
