"""Model folders as their makers publish them, small random weights apart, and the makers' own encoding of a conversation.

The tokenizers are the true ones: Mistral's SentencePiece model and Meta's tokenizer.model, out of the makers' own packages.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llama_models
import mistral_common
import torch
from llama_models.datatypes import RawMessage
from llama_models.llama3.chat_format import ChatFormat
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from LLM._base_model_handler import ChatMessage

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.3"
LLAMA = "meta-llama/Llama-3.2-3B-Instruct"
NEMO_FILE = "tekken_240718.json"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}

# What the folders' own templates write of a conversation without tools.
MISTRAL_TEMPLATE = """\
{%- set told = messages[0]["content"] + "\\n\\n" if messages[0]["role"] == "system" else "" %}
{%- set turns = messages[1:] if messages[0]["role"] == "system" else messages %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if (turn["role"] == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}
    {%- if turn["role"] == "user" %}{{ "[INST] " + (told if loop.last else "") + turn["content"] + "[/INST]" }}
    {%- else %}{{ " " + turn["content"] | trim + eos_token }}{% endif %}
{%- endfor %}"""
LLAMA_TEMPLATE = """\
{{- bos_token }}
{%- set told = messages[0]["content"] | trim if messages[0]["role"] == "system" else "" %}
{%- set turns = messages[1:] if messages[0]["role"] == "system" else messages %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: 26 Jul 2024\\n\\n" + told + "<|eot_id|>" }}
{%- for turn in turns %}
    {{- "<|start_header_id|>" + turn["role"] + "<|end_header_id|>\\n\\n" + turn["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""

QWEN_TEMPLATE = """\
{%- set ns = namespace(last=-1) %}
{%- for turn in messages %}{% if turn["role"] == "user" %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for turn in messages %}
    {%- set said = turn["content"] %}
    {%- if turn["role"] == "assistant" %}
        {%- set thought = said.split("</think>")[0].split("<think>")[-1] if "</think>" in said else "" %}
        {%- set said = said.split("</think>")[-1].lstrip("\n") %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {%- set said = "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + said %}
        {%- endif %}
    {%- endif %}
    {{- "<|im_start|>" + turn["role"] + "\n" + said + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- set told = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else "" %}
{%- set turns = messages[1:] if messages[0]["role"] == "system" else messages %}
{%- for turn in turns %}
    {%- if (turn["role"] == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("roles must alternate") }}{% endif %}
    {{- "<start_of_turn>" + ("model" if turn["role"] == "assistant" else turn["role"]) + "\n" }}
    {{- (told if loop.first else "") + turn["content"] | trim + "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\n" }}{% endif %}"""
TINY_TEMPLATE = """\
{%- for turn in messages %}
    {%- if turn["role"] == "system" %}{{ raise_exception("there is no system turn") }}{% endif %}
    {{- "<|begin|>" + turn["role"] + "\\n" + turn["content"] + "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|begin|>assistant\\n" }}{% endif %}"""


def tiny_folder(path: Path) -> Path:
    """Make the folder of a Llama that is as small as can be, whose template knows no system turn."""
    tokenizer = byte_tokenizer(["<|begin|>", "<|end|>"], [], TINY_TEMPLATE)
    tokenizer.save_pretrained(path)
    begin, end = tokenizer.convert_tokens_to_ids(["<|begin|>", "<|end|>"])
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), bos_token_id=begin, eos_token_id=end)
    # Wider than usual, so that different contexts give clearly different logits.
    config.initializer_range = 0.4
    _weights(path, config)
    return path


def tied_folder(
    path: Path, family: type[PreTrainedConfig], sizes: dict[str, Any], dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Make the folder of a small model of a family, whose tokenizer cuts a text into bytes."""
    tokenizer = byte_tokenizer(["<|begin|>", "<|end|>"], [], TINY_TEMPLATE)
    tokenizer.save_pretrained(path)
    begin, end = tokenizer.convert_tokens_to_ids(["<|begin|>", "<|end|>"])
    config = family(**sizes, vocab_size=len(tokenizer), bos_token_id=begin, eos_token_id=end, tie_word_embeddings=True)
    config.initializer_range = 0.4
    _weights(path, config, dtype)
    return path


def mistral_folder(path: Path) -> Path:
    """Make the folder of a small Mistral-7B-Instruct-v0.3."""
    tokenizer = mistral_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=MISTRAL_TEMPLATE,
    ).save_pretrained(path)
    size = tokenizer.get_vocab_size()
    _weights(path, MistralConfig(**SIZES, vocab_size=size, bos_token_id=1, eos_token_id=2, sliding_window=None))
    return path


def mistral_tokenizer() -> Tokenizer:
    """Give Mistral's tokenizer v3 as the published folder has it."""
    maker = _mistral().instruct_tokenizer.tokenizer
    assert isinstance(maker, SentencePieceTokenizer)
    model, vocabulary = maker._model, {piece: i for i, piece in enumerate(maker.vocab())}
    merges = generate_merges(vocabulary, {piece: model.get_score(i) for piece, i in vocabulary.items()})
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = [piece for piece, i in vocabulary.items() if model.is_control(i) or model.is_unknown(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    return tokenizer


def nemo_tokenizer(path: Path) -> Tokenizer:
    """Give Mistral-Nemo's tokenizer as the published folder has it; `path` is for a file on the way."""
    maker = _nemo().instruct_tokenizer.tokenizer
    assert isinstance(maker, Tekkenizer)
    tekken = json.loads((_mistral_data() / NEMO_FILE).read_text())
    count = maker.n_words - maker.num_special_tokens
    ranks = [f"{token['token_bytes']} {token['rank']}" for token in tekken["vocab"][:count]]
    path.write_text("\n".join(ranks))
    texts, merges = TikTokenConverter(str(path)).extract_vocab_merges_from_model(str(path))
    special = [maker.id_to_piece(i) for i in range(maker.num_special_tokens)]
    vocabulary = {text: i for i, text in enumerate(special)} | {text: i + len(special) for text, i in texts.items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(tekken["config"]["pattern"]), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return tokenizer


def byte_tokenizer(special: Sequence[str], ordinary: Sequence[str], template: str) -> PreTrainedTokenizerFast:
    """Give a tokenizer of bytes with a family's own added tokens and template, where its true one is not to be had."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ordinary])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], chat_template=template)


def llama_folder(path: Path) -> Path:
    """Make the folder of a small Llama-3.2-3B-Instruct."""
    PreTrainedTokenizerFast(
        tokenizer_object=llama_tokenizer(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=LLAMA_TEMPLATE,
    ).save_pretrained(path)
    ends = [_meta().eos_id, _meta().eom_id, _meta().eot_id]
    config = LlamaConfig(
        **SIZES, vocab_size=_meta().n_words, bos_token_id=_meta().bos_id, eos_token_id=ends, tie_word_embeddings=True
    )
    _weights(path, config)
    return path


def llama_tokenizer() -> Tokenizer:
    """Give Llama 3.2's tokenizer as the published folder has it."""
    special = list(_meta().special_tokens)
    converter = TikTokenConverter(str(_meta_model()), extra_special_tokens=special)
    tokenizer: Tokenizer = converter.converted()
    begin = ("<|begin_of_text|>", _meta().bos_id)
    tokenizer.post_processor = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    return tokenizer


def mistral_ids(messages: Sequence[ChatMessage]) -> list[int]:
    """Encode a conversation for Mistral 7B v0.3 as Mistral's package does; raises what that raises."""
    return _mistral_ids(_mistral(), messages)


def nemo_ids(messages: Sequence[ChatMessage]) -> list[int]:
    """Encode a conversation for Mistral-Nemo as Mistral's package does; raises what that raises."""
    return _mistral_ids(_nemo(), messages)


def _mistral_ids(tokenizer: MistralTokenizer, messages: Sequence[ChatMessage]) -> list[int]:
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    said = [kinds[message["role"]](content=message["content"]) for message in messages]
    goes_on = messages[-1]["role"] == "assistant"
    request: ChatCompletionRequest = ChatCompletionRequest(messages=said, continue_final_message=goes_on)
    return tokenizer.encode_chat_completion(request).tokens


def llama_ids(messages: Sequence[ChatMessage]) -> list[int]:
    """Encode a conversation as Meta's package does.

    It knows no message that goes on: that is the prompt for an answer, and then the answer's beginning.
    """
    goes_on = messages[-1]["role"] == "assistant"
    said = [RawMessage(**message) for message in (messages[:-1] if goes_on else messages)]
    ids = ChatFormat(_meta()).encode_dialog_prompt(said).tokens
    return ids + (_meta().encode(messages[-1]["content"], bos=False, eos=False) if goes_on else [])


@cache
def _mistral() -> MistralTokenizer:
    return MistralTokenizer.from_file(str(_mistral_data() / "mistral_instruct_tokenizer_240323.model.v3"))


@cache
def _nemo() -> MistralTokenizer:
    return MistralTokenizer.from_file(str(_mistral_data() / NEMO_FILE))


def _mistral_data() -> Path:
    return Path(mistral_common.__file__).parent / "data"


@cache
def _meta() -> MetaTokenizer:
    return MetaTokenizer(_meta_model())


def _meta_model() -> Path:
    return Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"


def _weights(path: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16) -> None:
    torch.manual_seed(1)
    config.dtype = dtype
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config.eos_token_id
