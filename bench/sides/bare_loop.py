"""The engine's own forward pass and sampler in a bare loop: no thread, no scheduler, no text, no socket. A child process.

What our server takes longer than this is its engine and its transport. The only file of the bench that imports the engine.
"""

from collections.abc import Callable, Hashable
from itertools import count

import torch
from tokenizers import Tokenizer

from bench.sides.in_process import Job, serve
from bench.sides.side import Setting
from LLM._base_model_handler import LoadOptions
from LLM.engine.request import GenerationRequest, Sampling
from LLM.engine.sequence import Sequence, Slice
from LLM.engine.step import Runner
from LLM.loader import load as load_model


def load(setting: Setting) -> Callable[[Job], None]:
    """Load the model; give what collects as many jobs as are to run at once, then runs them together."""
    options = LoadOptions(
        setting.dtype, setting.device, threads=setting.threads, decode=setting.decode, sequences=setting.streams
    )
    model = load_model(setting.folder, options, lambda stage, progress: None)
    together: list[Job] = []

    def run(job: Job) -> None:
        together.append(job)
        if len(together) == setting.streams:
            _decode(model.runner, model.tokenizer, together)
            together.clear()

    return run


@torch.inference_mode()
def _decode(runner: Runner, tokenizer: Tokenizer, jobs: list[Job]) -> None:
    running: dict[Hashable, tuple[Job, Sequence]] = {job.id: (job, _sequence(tokenizer, job)) for job in jobs}
    # Each sequence gets its blocks beforehand, since none comes or goes.
    block = count()
    for _, sequence in running.values():
        sequence.blocks = [next(block) for _ in range(-(-sequence.request.most_tokens // runner.block_size))]
    while running:
        batch = _next_batch([sequence for _, sequence in running.values()], runner.max_prefill)
        for part, sampled in zip(batch, runner.step(batch), strict=True):
            sequence = part.sequence
            sequence.computed = part.stop
            if sampled is None or sampled.token_id is None:
                continue
            sequence.token_ids.append(sampled.token_id)
            job, _ = running[sequence.request.key]
            job.arrived()
            if sequence.completion_tokens == job.max_tokens:
                job.done(len(sequence.request.prompt_ids), job.max_tokens)
                runner.free(job.id)
                del running[job.id]


def _sequence(tokenizer: Tokenizer, job: Job) -> Sequence:
    ids = tuple(tokenizer.encode(job.prompt).ids)
    return Sequence(GenerationRequest(job.id, ids, job.max_tokens, Sampling(temperature=0)))


def _next_batch(sequences: list[Sequence], most: int) -> list[Slice]:
    """Take all that is left of each, prompts in order up to `most` tokens, and decode once every prompt is done."""
    prompts = [s for s in sequences if len(s.token_ids) - s.computed > 1]
    batch = []
    for sequence in prompts or sequences:
        if most > 0:
            stop = min(sequence.computed + most, len(sequence.token_ids))
            batch.append(Slice(sequence, sequence.computed, stop))
            most -= stop - sequence.computed
    return batch


if __name__ == "__main__":
    serve(load)
