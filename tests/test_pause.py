"""A generation that was paused for another client's has the text that it has alone: with the real default model, by seed."""

import pytest

from LLM.engine.scheduler import Scheduler
from LLM.engine.sequence import Sequence
from tests.conftest import DEFAULT_MODEL, keyed, running

ASKED = {"prompt": "The old lighthouse keeper", "max_tokens": 40, "temperature": 0.8, "ignore_eos": True}


async def test_a_paused_answer_has_its_text_by_seed_and_tells_nothing_of_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[str] = []
    preempt = Scheduler._preempt

    def watched(scheduler: Scheduler, sequence: Sequence) -> None:
        paused.append(sequence.request.key[1])  # type: ignore[index]
        preempt(scheduler, sequence)

    monkeypatch.setattr(Scheduler, "_preempt", watched)
    async with (
        running(DEFAULT_MODEL, dtype="float32", max_active=2, keys=keyed("heavy", "light")) as server,
        server.client_of("heavy") as heavy,
        server.client_of("light") as light,
    ):
        for seed in (1, 2):
            await heavy.send(type="generate", id=f"alone{seed}", seed=seed, **ASKED)
            await heavy.done(f"alone{seed}")
        assert not paused
        for seed in (1, 2):
            await heavy.send(type="generate", id=f"beside{seed}", seed=seed, **ASKED)
            await heavy.until("token", id=f"beside{seed}")
        await light.send(type="generate", id="x", prompt="Once", max_tokens=5)
        await light.done("x")
        for seed in (1, 2):
            await heavy.done(f"beside{seed}")
        assert paused == ["beside2"]
        texts = heavy.checker.texts
        assert [texts[f"beside{seed}"] for seed in (1, 2)] == [texts[f"alone{seed}"] for seed in (1, 2)]
        assert not heavy.of("beside2", "queued")
        assert len(heavy.of("beside2", "started")) == 1
