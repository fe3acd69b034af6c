"""What differs between model families, with defaults that fit most: load options, chat template, stop tokens, sampling.

A drop-in subclasses this and states its facts. Importing it costs nothing: torch comes with the first model that needs it.
"""

import importlib
import secrets
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypedDict

from tokenizers import Tokenizer

from LLM.chat.length import check_text
from LLM.chat.reading import reading
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.step import Runner
from LLM.errors import Refused
from LLM.plain_text import Piece, PlainText


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """At which precision and where a model is to run, and how much of the machine it gets.

    "auto" is the precision that runs best there, and a GPU if there is one. `quantization` is "none", "int8", "nf4", "fp4".
    What the GPUs have no room for may `offload` to the CPU's memory. `kv_memory` is in bytes, `threads` those of a CPU; None
    leaves the choice to the loader. `decode` is "eager", "compiled" for a CPU, "graph" for a GPU and as many `sequences` at
    once, or "auto", the latter where it fits. A chat template may take `template_timeout` seconds for a conversation.
    """

    dtype: str = "auto"
    device: str = "auto"
    quantization: str = "none"
    offload: bool = False
    kv_memory: int | None = None
    threads: int | None = None
    decode: str = "auto"
    sequences: int = 8
    template_timeout: float = 2.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model will be loaded, nothing left open, and what memory that takes of all that its device has, in bytes."""

    options: LoadOptions
    memory_bytes: int
    device_bytes: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a load yields: a runner and a tokenizer, and the facts that requests are checked against."""

    runner: Runner
    tokenizer: Tokenizer
    context_length: int
    vocabulary_size: int
    dtype: str
    device: str
    # Writes a conversation as the model's prompt; None where the model folder has no chat template.
    chat_template: Callable[[Sequence[ChatMessage]], str] | None = None
    end_token_ids: frozenset[int] = frozenset()
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    # Whether a step uses all threads of the CPU: those of several models at once would take many times as long.
    takes_turns: bool = False
    # Gives memory back that is held for this model alone, once nothing else of it is there.
    on_unloaded: Callable[[], None] | None = None
    # What clients wrote becomes tokens here; made once, since it can take a moment.
    plain_text: PlainText = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plain_text", PlainText(self.tokenizer))


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """What a request may say about its generation; None takes the model's default."""

    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)


# Reports a load: the stage's name, and how much of it is done, 0 to 1. Raises to abort a load nobody waits for.
Progress = Callable[[str, float], None]

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class BaseModelHandler:
    """A model family's ways. Subclass it as `ModelHandler` in `LLM/model_srv_<vendor>_<model>.py`."""

    # The ids of a model without a folder; one with a folder is found by the folder's name.
    model_ids: ClassVar[tuple[str, ...]] = ()
    # Names that are one model, whichever of them its folder has.
    also_listed_as: ClassVar[tuple[str, ...]] = ()
    # Sampling where generation_config.json is silent.
    sampling: ClassVar[Mapping[str, float]] = {}
    # Whether only the first message may be the system's.
    system_first: ClassVar[bool] = False
    # Control tokens that end an answer, beside those that the folder names.
    end_tokens: ClassVar[tuple[str, ...]] = ()

    def plan(self, folder: Path, options: LoadOptions) -> Plan:
        """Say what a load from `folder` would come to, without loading; runs on a thread, and reads files.

        A model without a folder has nothing to quantise, and takes no memory worth counting.

        Raises:
            Refused: `load_failed` or `unsupported`, with what to do.
        """
        if self.model_ids:
            return Plan(replace(options, quantization="none"), 0, 0)
        plan: Plan = importlib.import_module("LLM.placement").plan(folder, options)
        return plan

    def load(self, folder: Path, options: LoadOptions, progress: Progress) -> LoadedModel:
        """Load the model from `folder`, by the options of a plan; runs on the engine's thread and takes its time.

        Raises:
            Refused: `load_failed` or `unsupported`, with what to do.
        """
        # Imported like a drop-in, when it is needed: torch takes seconds, and the echo model does without.
        loaded: LoadedModel = importlib.import_module("LLM.loader").load(folder, options, progress)
        return loaded

    def preprocess(self, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
        """Rewrite a conversation for a family whose template cannot say it; the default changes nothing.

        Raises:
            Refused: `bad_message` for what the family's template would write though the model has not learned it.
        """
        if self.system_first and any(message["role"] == "system" for message in messages[1:]):
            why = "has a system message that is not the first, the only place this model knows for one; move it there"
            raise Refused("bad_message", why, "messages")
        return messages

    def pieces(self, messages: Sequence[ChatMessage]) -> Iterable[Piece] | None:
        """Write a conversation as its makers' own package does; None leaves it to the folder's chat template.

        Raises:
            Refused: `bad_message` for a conversation that the makers' format cannot express.
        """
        return None

    def encode_chat(self, model: LoadedModel, messages: Sequence[ChatMessage]) -> list[int]:
        """Give the token ids of a conversation, up to where the answer begins.

        The text of a control token in a message is plain text, and never becomes that token.
        """
        plain_text, messages = model.plain_text, self.preprocess(messages)
        if (pieces := self.pieces(messages)) is not None:
            return plain_text.encode(pieces)
        if model.chat_template is None:
            why = "this model's folder has no chat template; send prompt instead, or have its operator write a drop-in"
            raise Refused("unsupported", why, "messages")
        hidden: list[str] = []
        safe = []
        for message in messages:
            reading().check()
            safe.append(ChatMessage(role=message["role"], content=plain_text.hide(message["content"], hidden)))
        return plain_text.encode_prompt(model.chat_template(safe), hidden)

    def encode_prompt(self, model: LoadedModel, prompt: str) -> list[int]:
        """Give the token ids of raw text, with the special tokens that every text of this model begins with.

        A raw prompt is in the client's own format: the text of a control token is that token, and a text that begins with
        those tokens already does not get them twice.
        """
        plain_text = model.plain_text
        check_text(prompt, partial(_count, model.tokenizer), plain_text.longest_token, plain_text.spaces_vanish)
        begin, ids = encode(model.tokenizer, ""), encode(model.tokenizer, prompt)
        return ids[len(begin) :] if begin and ids[: 2 * len(begin)] == begin * 2 else ids

    def request(
        self, model: LoadedModel, key: Hashable, prompt_ids: Sequence[int], options: GenerationOptions
    ) -> GenerationRequest:
        """Join what a client asked for with the model's defaults.

        Raises:
            Refused: `context_length_exceeded`, or `bad_message` for a token id that the model does not have.
        """
        room = model.context_length - len(prompt_ids)
        if not prompt_ids:
            raise Refused("bad_message", "gives no tokens; send some text", "prompt")
        if (largest := max(prompt_ids)) >= model.vocabulary_size:
            # It would fail the step, and with it all that runs; on a GPU even the device.
            raise Refused("bad_message", f"holds token {largest}, which the model itself does not know", "prompt")
        if room < (options.max_tokens or 1):
            raise Refused(
                "context_length_exceeded",
                f"the prompt has {len(prompt_ids)} tokens and {options.max_tokens or 1} more are asked for, but this "
                f"model's context is {model.context_length} tokens; shorten the prompt or lower max_tokens",
                "max_tokens" if options.max_tokens else None,
            )
        if options.min_tokens > (options.max_tokens or room):
            raise Refused("bad_message", "is more than max_tokens or the context allow", "min_tokens")
        _check_ids("stop_token_ids", options.stop_token_ids, model)
        _check_ids("logit_bias", options.sampling.get("logit_bias", ()), model)
        end_token_ids = frozenset() if options.ignore_eos else self._end_token_ids(model)
        return GenerationRequest(
            key=key,
            prompt_ids=tuple(prompt_ids),
            max_tokens=options.max_tokens or room,
            sampling=self._sampling(model, options),
            stop=options.stop,
            end_token_ids=end_token_ids.union(options.stop_token_ids),
            min_tokens=options.min_tokens,
            logprobs=options.logprobs,
        )

    def _end_token_ids(self, model: LoadedModel) -> frozenset[int]:
        stated = (model.tokenizer.token_to_id(text) for text in self.end_tokens)
        return model.end_token_ids.union(i for i in stated if i is not None)

    def _sampling(self, model: LoadedModel, options: GenerationOptions) -> Sampling:
        configured = {k: v for k in SAMPLING_DEFAULTS if (v := model.generation_config.get(k)) is not None}
        drawn = Sampling(seed=secrets.randbits(63))
        return replace(drawn, **{**self.sampling, **configured, **options.sampling})


def encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """Give the token ids of a text, without keeping other threads from running: `Tokenizer.encode` alone holds the GIL."""
    return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids


def _count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode_batch([text], add_special_tokens=False)[0])


def _check_ids(field: str, ids: Sequence[int], model: LoadedModel) -> None:
    for token_id in ids:
        if token_id >= model.vocabulary_size:
            last = model.vocabulary_size - 1
            raise Refused("bad_message", f"this model has no token {token_id}; its ids are 0 to {last}", field)
