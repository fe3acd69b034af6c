"""Makes a model's tokenizer out of what its GGUF file says, for a folder that has no tokenizer.json.

transformers makes one too, but its versions differ in it: some take the beginning of a text for its end, cut Gemma's text by
another algorithm, or split digits and long words otherwise than the model was trained.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from LLM.errors import Refused
from LLM.gguf_config import CONTROL
from LLM.gguf_file import GgufFile, Texts
from LLM.loading.steady_file import shown

NORMAL, USER_DEFINED = 1, 4  # types of tokens
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How byte-level tokenizers cut a text into words, by llama.cpp's names.
WORDS = {"gpt-2": GPT2, "smollm": GPT2, "llama-bpe": LLAMA3, "qwen2": QWEN2, "tekken": TEKKEN}
DIGITS = {"smollm"}  # that take each digit by itself first
WHOLE_WORDS = {"llama-bpe", "tekken"}  # that look whole words up before they merge; they also begin every text
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerFast:
    """Make the tokenizer, with the chat template that the file holds.

    Raises:
        Refused: `load_failed`, for a kind of tokenizer that is not known here.
    """
    facts = {
        name.removeprefix("tokenizer.ggml."): value
        for name, value in file.metadata.items()
        if name.startswith("tokenizer.ggml.")
    }
    kinds = {"llama": _sentencepiece, "gpt2": _byte_level}
    if facts.get("model") not in kinds or not isinstance(facts.get("tokens"), Texts):
        raise _refused("its GGUF file has a tokenizer of a kind that is not known here")
    tokenizer = kinds[facts["model"]](facts)
    _add_tokens(tokenizer, facts)
    texts, ids = facts["tokens"], {role: facts.get(f"{name}_token_id") for role, name in ROLES.items()}
    special = {role: texts[i] for role, i in ids.items() if i is not None}
    tokenizer.add_special_tokens(list(special.values()))
    _add_ends(tokenizer, facts, special)
    template = file.metadata.get("tokenizer.chat_template")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template, **special)
    # It would copy its tokenizer, by writing and reading it: 1.6 s for Gemma's, in which no other thread runs.
    wrapped._tokenizer = tokenizer
    return wrapped


def _sentencepiece(facts: Mapping[str, Any]) -> Tokenizer:
    """Make one whose merges follow from its tokens' scores, and whose unknown characters are bytes."""
    texts, types = facts["tokens"], facts["token_type"]
    scores = {text: score for text, score, kind in zip(texts, facts["scores"], types, strict=True) if kind == NORMAL}
    # What is not normal is never merged, and neither is what it would be merged of.
    merges = generate_merges({text: i for i, text in enumerate(texts) if text in scores}, scores)
    unknown = texts[facts["unknown_token_id"]] if "unknown_token_id" in facts else None
    vocabulary = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    end: list[decoders.Decoder] = []
    if facts.get("add_space_prefix", True):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        end = [decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    return tokenizer


def _byte_level(facts: Mapping[str, Any]) -> Tokenizer:
    """Make one that cuts a text into words and merges their bytes."""
    kind = facts.get("pre", "")
    if kind not in WORDS or "merges" not in facts:
        raise _refused(f'its GGUF file cuts text in a way that is not known here, "{shown(str(kind))}"')
    vocabulary = {text: i for i, text in enumerate(facts["tokens"])}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in facts["merges"])]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind in WHOLE_WORDS))
    first = [pre_tokenizers.Digits(individual_digits=True)] if kind in DIGITS else []
    words = [pre_tokenizers.Split(Regex(WORDS[kind]), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, *words])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
    """Name the tokens that are found in a text as a whole: those of control, and others that the makers chose."""
    typed = list(zip(facts["tokens"], facts.get("token_type", ()), strict=False))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text, kind in typed if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text, kind in typed if kind == USER_DEFINED])


def _add_ends(tokenizer: Tokenizer, facts: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Begin and end every text as the file says."""
    begins = facts.get("add_bos_token", facts["model"] == "llama" or facts.get("pre") in WHOLE_WORDS)
    start = [special["bos_token"]] if begins and "bos_token" in special else []
    end = [special["eos_token"]] if facts.get("add_eos_token", False) and "eos_token" in special else []
    if start or end:
        known = [(text, tokenizer.token_to_id(text)) for text in {*start, *end}]
        tokenizer.post_processor = processors.TemplateProcessing(" ".join([*start, "$A", *end]), special_tokens=known)


def _refused(why: str) -> Refused:
    advice = "put the model's own tokenizer.json and tokenizer_config.json beside it"
    return Refused("load_failed", f"the model's folder cannot be loaded: {why}; {advice}")
