"""A LoRA adapter of the target (peft): used where the user asks for it, refused where it would be used by chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from cache_format.errors import InputError

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def refuse_adapter_beside(name: str, revision: str | None) -> None:
    """Refuse a target that has an adapter in its folder: whether transformers uses it hangs on what is installed.

    Raises:
        InputError: says both ways out.
    """
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(name, revision=revision) is not None:
        raise InputError(
            f"--target {name}: has an adapter beside its weights ({CONFIG_NAME}). To use one, keep it in a folder of "
            "its own and pass --adapter FOLDER; to leave it out, pass a folder without it as --target"
        )


def adapter_files(folder: Path) -> list[Path]:
    """The two files of the adapter in ``folder``.

    Raises:
        InputError: one is not there.
    """
    files = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    for path in files:
        if not path.is_file():
            raise InputError(f"--adapter {folder}: has no {path.name}; give the folder that peft saved the adapter to")
    return files


def with_adapter(model: Any, folder: Path) -> nn.Module:
    """``model`` with the adapter in ``folder`` at work beside its weights, frozen.

    Raises:
        InputError: peft is not installed, or the adapter is not one for this target.
    """
    adapter_files(folder)
    try:
        model.load_adapter(str(folder))
    except ImportError:
        raise InputError("--adapter needs peft; run: pip install 'dflash-cache[adapter]'") from None
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"--adapter {folder}: cannot be used with this target: {reason}") from error
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen
