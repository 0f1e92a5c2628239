"""Element types by the names that safetensors and a manifest give them."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U64": torch.uint64,
    "U8": torch.uint8,
}
"""safetensors dtype name -> torch dtype, as far as this format uses them."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_STATES_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``.

    Raises:
        ValueError: not a dtype that hidden_states can be stored in.
    """
    if name not in _STATES_DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(_STATES_DTYPES)}")
    return _STATES_DTYPES[name]
