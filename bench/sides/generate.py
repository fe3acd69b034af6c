"""`model.generate` with a TextIteratorStreamer behind a queue: one request at a time. Runs as a child process."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer

from bench.sides.in_process import Job, serve
from bench.sides.side import Setting


def load(setting: Setting) -> Callable[[Job], None]:
    """Load the model; give what runs one job."""
    torch.set_num_threads(setting.threads)
    tokenizer = AutoTokenizer.from_pretrained(setting.folder)
    model = AutoModelForCausalLM.from_pretrained(setting.folder, dtype=getattr(torch, setting.dtype)).to(setting.device)
    executor = ThreadPoolExecutor(1)

    def run(job: Job) -> None:
        inputs = tokenizer(job.prompt, return_tensors="pt").to(model.device)
        # No end token, so that every side does the same work.
        config = GenerationConfig(max_new_tokens=job.max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
        answer = executor.submit(model.generate, **inputs, generation_config=config, streamer=streamer)
        for text in streamer:
            if text:
                job.arrived()
        prompt_tokens = inputs["input_ids"].shape[1]
        job.done(prompt_tokens, answer.result().shape[1] - prompt_tokens)

    return run


if __name__ == "__main__":
    serve(load)
