"""The server's own copy of a model's small files, which libraries read in the folder's place.

What is copied was read once and fits together, leads nowhere else, and says nothing that could reach a hub, another file or
code: whole families of keys are left out, since each version of a library knows new ones.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from LLM.errors import Refused
from LLM.loading.steady_file import SteadyFile, Version, shown
from LLM.model_folder import open_inside

SUFFIXES = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
# Indices of weights, adapters, which name a base model that is looked for on a hub, and settings of training.
LEFT_OUT = (".index.json", "adapter_config.json", "trainer_state.json")
LARGEST = 256 << 20  # bytes of one file; the largest published tokenizers take 35 MiB
CLEANED = ("config.json", "tokenizer_config.json", "generation_config.json")
# Keys by which libraries find code, hubs or files. Those with an underscore in front set private attributes.
KEYS = {
    *("auto_map", "trust_remote_code", "custom_generate", "custom_pipelines", "model_id", "repo_id"),
    *("use_kernels", "kernel_config", "fusion_config", "distributed_config", "tp_plan", "transformers_weights"),
    *("backbone", "use_timm_backbone", "use_pretrained_backbone", "timm_model", "name_or_path", "from_slow"),
    *("token", "use_auth_token", "revision", "proxies", "cache_dir", "subfolder", "variant", "force_download"),
}
ENDINGS = ("_implementation", "_name_or_path", "_file", "_files", "_revision", "_repo", "_spm")


@contextmanager
def own_copy(folder: Path) -> Iterator[tuple[Path, list[tuple[Path, Version]]]]:
    """Give a folder with the copies, which lasts as long as the context, and which versions of the files they are.

    Raises:
        Refused: `load_failed` for a file that cannot be read, or leads out of the models' folder.
    """
    with _temporary() as copies:
        versions = []
        for path in sorted(folder.iterdir()):
            if path.suffix in SUFFIXES and not path.name.endswith(LEFT_OUT) and path.is_file():
                with open_inside(folder, path) as file:
                    versions.append((path, file.version))
                    _write(copies / path.name, _content(file))
        yield copies, versions


@contextmanager
def _temporary() -> Iterator[Path]:
    try:
        made = TemporaryDirectory(prefix="wsserver-")
    except OSError as error:
        raise _no_room() from error
    with made as name:
        yield Path(name)


def _content(file: SteadyFile) -> bytes:
    if file.version.size > LARGEST:
        raise _refused(f"its {shown(file.path.name)} is larger than {LARGEST} bytes")
    content = file.read(file.version.size, 0)
    if file.path.name not in CLEANED:
        return content
    return json.dumps(cleaned(parsed(file.path.name, content))).encode()


def parsed(name: str, content: bytes) -> dict[str, Any]:
    """Return the fields of a JSON file.

    Raises:
        Refused: `load_failed`, if it has none.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _refused(f"its {name} cannot be read; copy it anew") from error
    if not isinstance(found, dict):
        raise _refused(f"its {name} has no fields; copy it anew")
    return found


def cleaned(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what remains of a configuration's fields, also of those within it."""
    return {key: _cleaned_value(value) for key, value in fields.items() if not _reaches_out(key)}


def _cleaned_value(value: Any) -> Any:
    return cleaned(value) if isinstance(value, dict) else value


def _reaches_out(key: str) -> bool:
    return key in KEYS or key.startswith("_") or key.endswith(ENDINGS)


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise _no_room() from error


def _no_room() -> Refused:
    why = "the server cannot write to its temporary folder; its operator can free space there, or set TMPDIR to another"
    return Refused("load_failed", why)


def _refused(why: str) -> Refused:
    return Refused("load_failed", f"the model's folder cannot be loaded: {why}")
