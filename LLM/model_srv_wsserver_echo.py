"""A model that repeats the last thing it was told, byte by byte: the example to copy, and the tests' double.

It runs on the real engine, needs no model folder, no torch and no time.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from LLM._base_model_handler import BaseModelHandler, ChatMessage, LoadedModel, LoadOptions, Progress
from LLM.engine.request import Alternative, Sampled
from LLM.engine.sequence import Slice

END = 256  # the token after the 256 bytes


class EchoRunner:
    """The next token is the prompt's next byte; after its last comes the end, after the end its first again."""

    memory_bytes = kv_bytes = 0
    # It needs no cache, but counts blocks like a model that does.
    block_count, block_size, reuses_blocks = 1 << 16, 16, True
    max_prefill = 256

    def __init__(self) -> None:
        self.notes: list[str] = []

    def step(self, batch: list[Slice]) -> list[Sampled | None]:
        """Advance each slice's sequence by one token, which it is sure of."""
        return [self._next(part) if part.samples else None for part in batch]

    def free(self, key: Hashable) -> None:
        """Nothing is kept between steps."""

    def _next(self, part: Slice) -> Sampled:
        request = part.sequence.request
        place = part.sequence.completion_tokens % (len(request.prompt_ids) + 1)
        token_id = request.prompt_ids[place] if place < len(request.prompt_ids) else END
        sure = () if request.logprobs is None else (Alternative(token_id, 0.0),) * (1 + min(request.logprobs, 1))
        return Sampled(token_id, sure)


class ModelHandler(BaseModelHandler):
    """Loads at once; a conversation's prompt is its last message."""

    model_ids = ("wsserver/echo",)

    def load(self, folder: Path, options: LoadOptions, progress: Progress) -> LoadedModel:
        """Make a byte tokenizer and the runner; there is nothing to read."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|end|>"])
        return LoadedModel(EchoRunner(), tokenizer, 65536, END + 1, "none", "cpu", end_token_ids=frozenset({END}))

    def encode_chat(self, model: LoadedModel, messages: Sequence[ChatMessage]) -> list[int]:
        """Give the last message's bytes."""
        return model.plain_text.encode([messages[-1]["content"]])
