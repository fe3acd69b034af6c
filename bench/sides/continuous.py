"""transformers' continuous batching, called in process. Runs as a child process.

It makes no text of its tokens: what it is measured at is its engine alone, which is in its favour. As it ships, or with the
argument `best` with what its documentation names as faster on a GPU.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    ContinuousBatchingManager,
    GenerationConfig,
)

from bench.sides.in_process import Job, serve
from bench.sides.side import Setting


def load(setting: Setting) -> Callable[[Job], None]:
    """Load the model and start the batching thread; give what hands it a job."""
    torch.set_num_threads(setting.threads)
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    model = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=getattr(torch, setting.dtype)).to(setting.device)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    best = ContinuousBatchingConfig(use_cuda_graph=True, use_async_batching=True, default_compile_level=1)
    batching = model.init_continuous_batching(
        generation_config=config, continuous_batching_config=best if "best" in sys.argv[2:] else None
    )
    batching.start()
    jobs: dict[str, Job] = {}

    threading.Thread(target=_collect, args=(batching, jobs), daemon=True).start()

    def run(job: Job) -> None:
        jobs[str(job.id)] = job
        ids = tokenizer(job.prompt)["input_ids"]
        batching.add_request(ids, str(job.id), max_new_tokens=job.max_tokens, streaming=True, eos_token_id=-1)

    return run


def _collect(batching: ContinuousBatchingManager, jobs: Mapping[str, Job]) -> None:
    try:
        for output in batching:
            if output.error:
                raise RuntimeError(output.error)
            job = jobs[output.request_id]
            job.arrived()
            if output.is_finished():
                job.done(len(output.prompt_ids), len(output.generated_tokens))
    finally:
        # An error of one request has ended the batching thread, and whoever waits for an answer waits in vain.
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    serve(load)
