"""transformers itself, asked for the same answers: what a greedy text in float32 is measured by."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 24
TINY_MARGIN = 1e-3  # between the two best logits: nearer than that, either is a right answer in float32


class Reference:
    """The stock model, and what it says greedily."""

    def __init__(self, folder: Any) -> None:
        torch.set_num_threads(1)  # as the server does; two threads on a busy machine mostly wait for each other
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._answers: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}

    def answer(self, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
        """Give the continuation's ids, and by how much each was preferred to the second best."""
        key = tuple(prompt_ids)
        if key not in self._answers:
            ids = torch.tensor([prompt_ids])
            settings = {
                "do_sample": False,
                "max_new_tokens": NEW_TOKENS,
                "output_logits": True,
                "return_dict_in_generate": True,
            }
            made = self.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
            best = [row[0].topk(2).values for row in made.logits]
            margins = [float(first - second) for first, second in best]
            self._answers[key] = made.sequences[0, len(prompt_ids) :].tolist(), margins
        return self._answers[key]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.backend_tokenizer.decode(ids)

    def of_prompt(self, prompt: str) -> tuple[list[int], list[float]]:
        return self.answer(self.tokenizer(prompt)["input_ids"])

    def of_chat(self, messages: list[dict[str, str]]) -> tuple[list[int], list[float]]:
        return self.answer(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    def first_difference(self, text: str, ids: list[int]) -> int | None:
        """Give the number of the first token of the reference's that the text does not have."""
        return next((n for n in range(len(ids)) if not text.startswith(self.text(ids[: n + 1]).rstrip("\ufffd"))), None)


def assert_the_same(
    reference: Reference, texts: dict[str, str], answers: dict[str, tuple[list[int], list[float]]], most: int = 2
) -> None:
    """Every text is the reference's, but for `most` of them, and those part from it at a near-tie."""
    different = {}
    for name, text in texts.items():
        ids, margins = answers[name]
        if text != reference.text(ids):
            at = reference.first_difference(text, ids)
            different[name] = margins[at] if at is not None else "longer than the reference"
    assert len(different) <= most, different
    assert all(isinstance(margin, float) and margin < TINY_MARGIN for margin in different.values()), different
