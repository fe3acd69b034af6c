"""Loads a Hugging Face model folder: safetensors, tokenizer, chat template. Runs on the engine's thread, never on the loop.

Only local files, only safetensors and GGUF, never code that came with a model.
"""

import logging
import os
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from LLM import gguf_config, gguf_tokenizer, model_folder
from LLM._base_model_handler import LoadedModel, LoadOptions, Progress
from LLM.chat import template
from LLM.engine.attention import DoesNotFit, PagedCache
from LLM.engine.compiled_runner import CompiledRunner
from LLM.engine.fuse import fuse
from LLM.engine.huge_pages import move_to_huge_pages
from LLM.engine.plain_runner import PlainRunner
from LLM.engine.runner import BLOCK_SIZE, PagedRunner, page
from LLM.engine.step import Runner
from LLM.errors import Refused
from LLM.gguf_weights import packed_weights
from LLM.giving_way import giving_way
from LLM.loading.exclusive import LOADING
from LLM.loading.generation_values import checked
from LLM.loading.memory import freeze_libraries, give_back
from LLM.loading.own_copy import own_copy, parsed
from LLM.loading.steady_file import check_unchanged
from LLM.model_folder import ModelFolder
from LLM.pinned_copy import PinnedCopy
from LLM.placement import ALL_GPUS, CPU_KV_MEMORY, DTYPES, cores, plan, shares
from LLM.quantize import bitsandbytes_config, settle
from LLM.stored_weights import in_memory, stored_weights

try:
    from LLM.engine.graph_runner import GraphRunner
except ModuleNotFoundError:  # Triton is not to be had on every platform
    GraphRunner = None  # type: ignore[assignment, misc]

log = logging.getLogger(__name__)

if not torch.cuda.is_available():
    # Weights are read one after the other, on the engine's thread: a load must not take the cores that others' streams need.
    # Where there is a GPU, transformers' threads bring them there several times faster.
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
LARGEST_BUFFERS = 1 << 24  # numbers
GPU_KV_SHARE = 0.9  # of what the weights left free


def load(folder: Path, options: LoadOptions, progress: Progress) -> LoadedModel:
    """Load the model in `folder`.

    Raises:
        Refused: `unsupported` for options this machine cannot serve, `load_failed` for a folder that cannot be loaded.
    """
    transformers_logging.disable_progress_bar()
    progress("config", 0.0)
    options = plan(folder, options).options
    try:
        with giving_way(), _refusing("its operator finds the details in the server's log"):
            found = model_folder.read(folder)
            name = f"{folder.parent.name}/{folder.name}"
            with own_copy(folder) as (copies, versions), LOADING.hold(name, partial(progress, "config", 0.0)):
                loaded = _load(copies, found, options, progress)
                check_unchanged(versions)
                return loaded
    except BaseException as error:
        _let_go(error)
        raise


def _let_go(error: BaseException | None) -> None:
    """Free what was loaded so far: an error holds all that the functions had in which it was raised."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    _give_back()  # layers of 4 bits hold themselves


def _give_back() -> None:
    give_back()
    torch.cuda.empty_cache()


@contextmanager
def _refusing(advice: str) -> Iterator[None]:
    """Turn what a bad folder raises into a refusal that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = "the device has not enough memory for the model; a smaller dtype may do, or fewer models beside it"
        raise Refused("load_failed", why) from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        message = f"the model's folder cannot be loaded ({type(error).__name__}): {advice}"
        raise Refused("load_failed", message) from error


def _load(folder: Path, found: ModelFolder, options: LoadOptions, progress: Progress) -> LoadedModel:
    device = torch.device(options.device)
    if device.type == "cpu":
        # One core stays free for the event loop: decoding on all of them makes every frame late.
        torch.set_num_threads(options.threads or max(1, cores() - 1))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the driver starts now, and not while weights are read
    with _refusing("its config.json cannot be used; a newer transformers may know its architecture"):
        config = _config(folder, found)
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _refusing("its tokenizer cannot be read; copy its tokenizer.json and tokenizer_config.json anew"):
        tokenizer = _tokenizer(folder, found)
    with _refusing("its config.json does not fit its weights; copy both anew"):
        _check_size(architecture, config, found)
    freeze_libraries()
    model = _model(found, architecture, config, options, progress)
    progress("warmup", 0.0)
    settle(model, partial(progress, "warmup", 0.0))
    # What only a GPU can prove is for those who ask for it.
    if device.type == "cpu" or options.decode == "graph":
        log.info("fused: %s", ", ".join(fuse(model)) or "nothing")
    move_to_huge_pages([*model.parameters(), *model.buffers()], partial(progress, "warmup"))
    positions = _positions(config.get_text_config())
    runner = _runner(model, options, positions)
    log.info("the model takes %d MiB", runner.memory_bytes >> 20)  # counted here, off the event loop
    if len(places := {str(place) for place in getattr(model, "hf_device_map", {}).values()}) > 1:
        runner.notes.append(f"is spread over {', '.join(sorted(places))}")
    chat_template = _chat_template(tokenizer, options.template_timeout)
    if chat_template and (problem := chat_template.probe()):
        runner.notes.append(f"takes no messages: {problem}")
    text_config = config.get_text_config()
    generation, notes = _generation(folder, model, text_config.vocab_size)
    runner.notes += notes
    return LoadedModel(
        runner=runner,
        tokenizer=tokenizer.backend_tokenizer,
        context_length=min(positions, runner.block_count * runner.block_size),
        vocabulary_size=text_config.vocab_size,
        dtype=options.dtype,
        device=options.device,
        chat_template=chat_template,
        end_token_ids=_end_token_ids(generation, tokenizer),
        generation_config=generation,
        takes_turns=device.type == "cpu",
        on_unloaded=_give_back,
    )


def _config(folder: Path, found: ModelFolder) -> Any:
    if found.gguf and not (folder / "config.json").exists():
        return AutoConfig.for_model(**gguf_config.config_of(found.gguf))
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _tokenizer(folder: Path, found: ModelFolder) -> Any:
    if not found.gguf or (folder / "tokenizer.json").exists():
        # With mistral-common installed, a tekken.json in the folder may bring a tokenizer of another kind.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, mistral_format=False)
    tokenizer = gguf_tokenizer.tokenizer_of(found.gguf)
    if (written := folder / "chat_template.jinja").exists():
        tokenizer.chat_template = written.read_text(encoding="utf-8")
    return tokenizer


def _check_size(architecture: Any, config: Any, found: ModelFolder) -> None:
    """Check that a model has no more numbers than its files: what they lack would be allocated before it is missed."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    buffers = sum(buffer.numel() for buffer in empty.buffers())
    if parameters > found.parameters:
        why = f"{architecture.__name__} of its config.json has {parameters} parameters, and its files {found.parameters}"
        raise Refused("load_failed", f"the model's folder lacks some of its tensors: {why}; is a weights file missing?")
    if buffers > max(found.parameters, LARGEST_BUFFERS):
        raise Refused("load_failed", "the model's config.json asks for tables larger than the model; copy it anew")


def _model(found: ModelFolder, architecture: Any, config: Any, options: LoadOptions, progress: Progress) -> Any:
    dtype = DTYPES[options.dtype]
    quantised = [tensor.name for tensor in found.tensors if tensor.is_linear] if options.quantization != "none" else []
    spread = options.device == str(ALL_GPUS)
    progress("weights", 0.0)
    packed = found.gguf and packed_weights(found.gguf, config.get_text_config(), dtype, quantised, progress)
    device = torch.device(options.device)
    bring = PinnedCopy(device) if device.type == "cuda" and not spread else in_memory
    with packed or stored_weights(found, quantised, bring, progress) as weights:
        model, report = architecture.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            device_map="auto" if spread else {"": options.device},
            max_memory=shares(options) if spread else None,
            quantization_config=bitsandbytes_config(options, dtype),
            output_loading_info=True,
        )
    if missing := report["missing_keys"]:
        # transformers would go on with random numbers in their place.
        raise Refused("load_failed", f"the model's folder lacks {len(missing)} of its tensors; is a weights file missing?")
    return model


def _runner(model: Any, options: LoadOptions, positions: int) -> Runner:
    try:
        token_bytes = page(model)
    except DoesNotFit as misfit:
        log.warning("serving without a paged KV cache: %s", misfit, exc_info=misfit.__cause__)
        return _plain(model, f"runs one sequence after the other, eagerly and without a paged KV cache: {misfit}")
    on_gpu, blocks = model.device.type == "cuda", _blocks(token_bytes, options.kv_memory)
    if options.decode == "graph" and on_gpu and len(token_bytes) == 1 and GraphRunner is not None:
        return GraphRunner(model, blocks, options.sequences, positions)
    cache = PagedCache(blocks, BLOCK_SIZE)
    if options.decode == "compiled" and not on_gpu and options.quantization == "none":
        return CompiledRunner(model, cache)
    runner = PagedRunner(model, cache)
    if options.decode == "graph":
        runner.notes.append("decodes eagerly: graphs need one CUDA device, and Triton")
    elif options.decode == "compiled":
        runner.notes.append("decodes eagerly: compiled graphs are for a CPU, and for weights that are not quantised")
    runner.warm_up()
    return runner


def _blocks(token_bytes: Mapping[torch.device, int], kv_memory: int | None) -> int:
    """Give how many blocks the KV cache gets, whose tokens take so many bytes on each device."""
    if kv_memory is not None:
        room = [(kv_memory, sum(token_bytes.values()))]
    else:
        room = [(_kv_memory_on(device), size) for device, size in token_bytes.items()]
    memory, size = min(room, key=lambda each: each[0] / each[1])
    if blocks := memory // (size * BLOCK_SIZE):
        return blocks
    need = size * BLOCK_SIZE
    raise Refused("load_failed", f"the KV cache may have {memory} bytes, but {need} hold {BLOCK_SIZE} tokens; allow more")


def _kv_memory_on(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_KV_MEMORY
    torch.cuda.empty_cache()  # what torch keeps for itself is not free to the GPU
    return int(torch.cuda.mem_get_info(device)[0] * GPU_KV_SHARE)


def _plain(model: Any, note: str) -> Runner:
    runner = PlainRunner(model, note)
    try:
        runner.check()
    except DoesNotFit as misfit:
        raise Refused("load_failed", f"models of this kind cannot be served: {misfit}") from misfit
    return runner


def _positions(config: Any) -> int:
    """Give how many positions a model knows.

    LongRoPE turns by other angles in every step whose longest sequence is longer than those it was first trained on: one
    request would change what its neighbours say. It is served up to that length.
    """
    ropes = getattr(config, "rope_parameters", None) or {}
    each = [ropes, *(rope for rope in ropes.values() if isinstance(rope, dict))]
    original = [rope["original_max_position_embeddings"] for rope in each if rope.get("rope_type") == "longrope"]
    positions: int = min([config.max_position_embeddings, *original])
    return positions


def _chat_template(tokenizer: Any, seconds: float = template.SECONDS) -> template.ChatTemplate | None:
    try:
        source = tokenizer.get_chat_template()
    except ValueError:  # it has none, or several and none to be used by itself
        return None
    return template.ChatTemplate(source, tokenizer.special_tokens_map, seconds) if source else None


def _generation(folder: Path, model: Any, vocabulary: int) -> tuple[dict[str, Any], list[str]]:
    """Give the defaults of generation, and a note for each that is ignored."""
    file = folder / "generation_config.json"
    stated = parsed(file.name, file.read_bytes()) if file.exists() else model.generation_config.to_dict()
    return checked(stated, vocabulary)


def _end_token_ids(generation_config: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    configured = generation_config["eos_token_id"]
    ids = configured if isinstance(configured, list) else [configured, tokenizer.eos_token_id]
    return frozenset(i for i in ids if i is not None)
