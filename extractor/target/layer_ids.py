"""Which decoder layers of the target are captured."""

from __future__ import annotations

from cache_format.errors import InputError
from extractor.config import TargetOptions


def default_target_layer_ids(num_draft_layers: int, num_target_layers: int) -> list[int]:
    """The layers published for DFlash: ``round(1 + i*(N-4)/(n-1))`` for i = 0..n-1, and ``N//2`` for one draft layer.

    ``round`` is Python's (halves to even), as in the published code. They run from the second layer to the third
    from the end, whose output still feeds later ones.

    Raises:
        InputError: no draft layer, or the target has too few layers for that many different ones.
    """
    if num_draft_layers < 1:
        raise InputError(f"--num-draft-layers {num_draft_layers}: must be at least 1")
    n, total = num_draft_layers, num_target_layers
    ids = [total // 2] if n == 1 else [round(1 + i * (total - 4) / (n - 1)) for i in range(n)]
    if len(set(ids)) != n or ids != sorted(ids) or not 0 <= ids[0] <= ids[-1] < total:
        raise InputError(
            f"a target of {total} layers is too small for the default of {n} captured layers; "
            "give fewer with --num-draft-layers, or name them with --target-layers"
        )
    return ids


def chosen_layer_ids(target: TargetOptions, num_hidden_layers: int) -> list[int]:
    """The layers to capture from a target of ``num_hidden_layers``.

    Raises:
        InputError: a layer that the target does not have, or one named twice.
    """
    if target.target_layer_ids is None:
        return default_target_layer_ids(target.num_draft_layers, num_hidden_layers)
    ids = list(target.target_layer_ids)
    wrong = [i for i in ids if not 0 <= i < num_hidden_layers]
    if wrong or not ids:
        raise InputError(f"--target-layers {ids}: the target has layers 0..{num_hidden_layers - 1}")
    if len(set(ids)) != len(ids):
        raise InputError(f"--target-layers {ids}: a layer is named twice")
    return ids


def parse_layer_ids(text: str, option: str = "--target-layers") -> list[int]:
    """``"1,9,17"`` -> ``[1, 9, 17]``; whether there are such layers is found out later.

    Raises:
        InputError: not whole numbers separated by commas.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: write whole numbers separated by commas, such as 1,9,17") from None
