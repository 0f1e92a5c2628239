"""Greedy speculative decoding with a DFlash draft, and plain greedy decoding to compare with. Written to be read.

No KV cache: every pass of the target runs the whole text so far. What is counted is passes of the target, which is what
a draft saves; their time is another matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from dflash_draft import Draft
from torch import Tensor, nn

from extractor.target.hooks import HFDFlashTargetModel


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An answer and what it took."""

    tokens: list[int]
    passes: int
    """of the target, the one over the prompt not counted"""

    @property
    def acceptance_length(self) -> float:
        """Tokens a pass of the target: 1 without a draft's help, block_size at the most."""
        return (len(self.tokens) - 1) / max(1, self.passes)


@torch.no_grad()
def decode_greedily(target: HFDFlashTargetModel, prompt: list[int], length: int) -> Decoded:
    """``length`` tokens after ``prompt``, one a pass."""
    ids = list(prompt)
    for _ in range(length):
        _, best = run(target, ids)
        ids.append(best[-1])
    return Decoded(tokens=ids[len(prompt) :], passes=length - 1)


@torch.no_grad()
def decode_with_draft(
    target: HFDFlashTargetModel, draft: Draft, embed: nn.Module, head: nn.Module, prompt: list[int], length: int
) -> Decoded:
    """``length`` tokens after ``prompt``: the draft proposes a block, one pass of the target checks it.

    Of a block the longest beginning that the target would have chosen itself is taken, and the token that the target
    chooses after it: so the answer is that of :func:`decode_greedily`, whatever the draft proposes.
    """
    states, best = run(target, prompt)
    ids, anchor, answer, passes = list(prompt), best[-1], [best[-1]], 0
    while len(answer) < length:
        proposed = draft.propose(states, anchor, embed, head).tolist()
        states, best = run(target, [*ids, anchor, *proposed])
        passes += 1
        chosen = best[len(ids) :]
        right = next((i for i, token in enumerate(proposed) if token != chosen[i]), len(proposed))
        new = [*proposed[:right], chosen[right]]
        ids += [anchor, *proposed[:right]]
        states, anchor = states[:, : len(ids)], new[-1]
        answer += new
    return Decoded(tokens=answer[:length], passes=passes)


@dataclass(frozen=True)
class Answer:
    """What the target says by itself, with its states: enough to see what a draft would have been good for."""

    ids: list[int]
    """prompt and answer, S tokens, each of the answer the one that the target would choose after those before"""
    prompt: int
    """tokens of the prompt"""
    states: Tensor
    """``[1, S, L*H]``"""


@torch.no_grad()
def replay(answer: Answer, draft: Draft, embed: nn.Module, head: nn.Module) -> int:
    """Passes of the target that :func:`decode_with_draft` would take for ``answer``, without running the target.

    It would give these very tokens, so it is known already what the target says to each proposal.
    """
    ids, at, passes = answer.ids, answer.prompt, 0
    while at < len(ids) - 1:
        proposed = draft.propose(answer.states[:, :at], ids[at], embed, head).tolist()
        pairs = zip(proposed, ids[at + 1 :], strict=False)
        at += 1 + next((i for i, (guess, right) in enumerate(pairs) if guess != right), len(proposed))
        passes += 1
    return passes


def run(target: HFDFlashTargetModel, ids: list[int]) -> tuple[Tensor, list[int]]:
    """Captured states ``[1, S, L*H]``, and the token that the target would choose after each of ``ids``."""
    row = torch.tensor([ids], device=target.get_input_embeddings().weight.device)
    batch = target.generate_batch(row, torch.ones_like(row), torch.ones_like(row))
    assert batch.logits is not None
    return batch.hidden_states, batch.logits[0].argmax(-1).tolist()
