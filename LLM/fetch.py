"""Downloads a model from a Hugging Face hub into the models' folder: `wsserver fetch <vendor>/<model>`.

An operator's tool in a process of its own, never part of a running server. The model's folder appears whole or not at all;
what an interrupted run had is kept, and the next one goes on from there.
"""

import argparse
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import quote

from filelock import FileLock, Timeout
from huggingface_hub import ModelInfo, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client it uses, which is another one since 2.0
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, validate_repo_id

from LLM import model_folder
from LLM.download.bounds import BoundedFile, bound_errors, is_name, is_size, listing
from LLM.errors import Refused
from LLM.hub_files import HubFile, NotFetched, choose, size

ROOT = Path(__file__).parent
HUB = constants.ENDPOINT
WORK = ".fetching"
AGAIN = "run the same command again, it goes on where it stopped"
NO_HUB = "{} does not answer as a hub does; set HF_ENDPOINT to one that does"
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with status 1 and one line for what cannot be fetched."""
    asked = _parser().parse_args(arguments)
    try:
        folder = fetch(asked.id, asked.models, asked.revision, asked.file)
    except NotFetched as failed:
        sys.exit(f"wsserver fetch: {asked.id!r}: {failed}")
    except KeyboardInterrupt:
        sys.stderr.write(f"\nwsserver fetch: stopped; {AGAIN}\n")
        sys.exit(130)
    sys.stdout.write(f"fetched {asked.id} into {folder}\n")
    try:
        model_folder.read(folder)
    except Refused as refused:
        sys.stdout.write(f"this version cannot serve it: {refused.message}\n")
    else:
        models = "" if asked.models == ROOT else f" --models {asked.models}"
        sys.stdout.write(f"serve it:  wsserver --model {asked.id}{models}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wsserver fetch",
        description="Downloads a model into the models' folder: safetensors or GGUF weights, and what belongs to them.",
        epilog="HF_TOKEN is the token for models that need one; HF_ENDPOINT is another hub or a mirror, like https://host.",
    )
    parser.add_argument("id", metavar="VENDOR/MODEL", help="the model's id on the hub")
    parser.add_argument("--revision", default="main", metavar="R", help="a branch, tag or commit (default: main)")
    parser.add_argument("--file", metavar="NAME", help="the GGUF file to take, where there are several")
    parser.add_argument(
        "--models",
        type=_folder,
        default=os.environ.get("WSSERVER_MODELS", "auto"),
        metavar="DIR",
        help="the models' folder, also as WSSERVER_MODELS; auto is LLM, where the default model is (default: auto)",
    )
    return parser


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder")
    return ROOT if text == "auto" else Path(text)


def fetch(model: str, root: Path, revision: str = "main", named: str | None = None) -> Path:
    """Download a model into its folder under `root`, and give that folder; `named` is the GGUF file to take of several.

    Raises:
        NotFetched: it is there already, cannot be had, or did not arrive whole.
    """
    with _explaining(model, revision):
        folder = root / _checked(model)
        _refuse_if_there(folder)
        commit, files = _list(model, revision)
        chosen = choose(files, named)
        work = root / WORK / model.replace("/", "--")
        work.mkdir(parents=True, exist_ok=True)
        with _alone(work):
            _refuse_if_there(folder)
            # Named by what they are to hold, so that no revision goes on where another one stopped.
            parts = {file: work / f"{file.name}.{file.digest}" for file in chosen}
            _refuse_if_too_large(parts, root)
            for number, (file, part) in enumerate(parts.items(), 1):
                _download(file, part, hf_hub_url(model, file.path, revision=commit, endpoint=HUB), f"{number}/{len(parts)}")
            _put_together(parts, work / "whole", folder)
            shutil.rmtree(work)
        with suppress(OSError):  # another one may be under way
            work.parent.rmdir()
    return folder


def _checked(model: str) -> str:
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise NotFetched("this is no id of a model; ids look like HuggingFaceTB/SmolLM2-135M-Instruct") from error
    if "/" not in model:
        raise NotFetched("the id lacks its vendor; ids look like HuggingFaceTB/SmolLM2-135M-Instruct")
    return model


def _refuse_if_there(folder: Path) -> None:
    if folder.exists():
        raise NotFetched(f"it is there already, at {folder}; remove that folder to fetch it anew")


def _list(model: str, revision: str) -> tuple[str, list[HubFile]]:
    """Give the commit that a revision is now, and its files."""
    url = f"{HUB}/api/models/{model}/revision/{quote(revision, safe='')}"
    try:
        info = ModelInfo(**listing(url, _answered))  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotFetched(NO_HUB.format(HUB)) from error
    if not isinstance(info.sha, str) or not DIGEST.fullmatch(info.sha) or info.siblings is None:
        raise NotFetched(f"{HUB} does not list its files; set HF_ENDPOINT to a hub that does")
    # A name that no file may have is that of no file that is needed.
    files = [sibling for sibling in info.siblings if is_name(sibling.rfilename)]
    return info.sha, [_hub_file(model, info.sha, sibling) for sibling in files]


def _hub_file(model: str, commit: str, sibling: RepoSibling) -> HubFile:
    length, digest = sibling.size, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if length is None or digest is None:  # some mirrors tell it only file by file
        stated = get_hf_file_metadata(hf_hub_url(model, sibling.rfilename, revision=commit, endpoint=HUB))
        length, digest = stated.size, stated.etag
    if length is None or not is_size(length) or not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise NotFetched(f"{HUB} does not tell its files' sizes and hashes; set HF_ENDPOINT to a hub that does")
    return HubFile(sibling.rfilename, length, digest)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Keep other processes out of a work folder; the lock ends with its process, however that ends."""
    try:
        with FileLock(work / "lock", blocking=False):
            yield
    except Timeout as error:
        raise NotFetched("another process is fetching it now; wait for that one") from error


def _refuse_if_too_large(parts: dict[HubFile, Path], root: Path) -> None:
    here = sum(part.stat().st_size for part in parts.values() if part.exists())
    missing, free = sum(file.size for file in parts) - here, shutil.disk_usage(root).free
    if missing > free:
        raise NotFetched(
            f"{size(missing)} are to come, but {root} has {size(free)} free; make room, or choose another --models"
        )


def _download(file: HubFile, part: Path, url: str, number: str) -> None:
    """Download a file, or what is missing of it."""
    have = part.stat().st_size if part.exists() else 0
    if have > file.size:
        part.unlink()
        have = 0
    if not part.exists() or have < file.size:
        if not sys.stderr.isatty():  # a terminal is shown a progress bar
            sys.stderr.write(f"{number} {file.path}, {size(file.size - have)}\n")
        # Ranges of a compressed answer would be of something else.
        headers = build_hf_headers(library_name="wsserver") | {"Accept-Encoding": "identity"}
        with part.open("ab") as opened:
            bound_errors()
            bounded = cast(BinaryIO, BoundedFile(opened, file.path, file.size))
            try:
                http_get(url, bounded, resume_size=have, headers=headers, displayed_filename=f"{number} {file.name}")
            except (ValueError, OverflowError) as error:  # a length that is none
                raise NotFetched(NO_HUB.format(HUB)) from error
    if not file.is_copied_by(part):
        came = part.stat().st_size
        part.unlink()
        raise NotFetched(
            f"{file.path} came with {came} bytes that are not the {file.size} of the hub's; run the same command again"
        )


def _put_together(parts: dict[HubFile, Path], whole: Path, folder: Path) -> None:
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    for file, part in parts.items():
        part.rename(whole / file.name)
    folder.parent.mkdir(exist_ok=True)
    whole.rename(folder)


@contextmanager
def _explaining(model: str, revision: str) -> Iterator[None]:
    """Turn what goes wrong on the way into one line that says what to do."""
    try:
        yield
    except GatedRepoError as error:
        why = f"it is given to those only who asked for it at {HUB}/{model}; ask there, then set HF_TOKEN to your token"
        raise NotFetched(why) from error
    except RepositoryNotFoundError as error:
        raise NotFetched(_answered(404)) from error
    except RevisionNotFoundError as error:
        raise NotFetched(f"it has no revision {revision!r}; choose a branch, tag or commit that it has") from error
    except OfflineModeIsEnabled as error:
        raise NotFetched("HF_HUB_OFFLINE is set, which forbids every download; unset it") from error
    except HfHubHTTPError as error:
        raise NotFetched(_answered(error.response.status_code)) from error
    except HTTPError as error:
        why = f"{HUB} cannot be reached ({type(error).__name__}); check the network, or set HF_ENDPOINT to a mirror"
        raise NotFetched(f"{why}, then {AGAIN}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NotFetched(f"the disk is full; make room, then {AGAIN}") from error
        raise NotFetched(f"{error}; put that right, then {AGAIN}") from error


def _answered(status: int) -> str:
    if status in (401, 403):
        return f"{HUB} refuses it ({status}); set HF_TOKEN to a valid token that may read it"
    if status == 404:
        return f"{HUB} has no such model, or a private one; check the id, or set HF_TOKEN to a token that may read it"
    return f"{HUB} answered {status}; wait a while, then {AGAIN}"


if __name__ == "__main__":
    main()
