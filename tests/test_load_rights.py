"""What one client may have loaded: how many models, how often, which, and what it cannot take from others."""

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from LLM import model_folder
from LLM._base_model_handler import LoadedModel, LoadOptions, Progress
from LLM.catalogue.folder_cache import FolderCache
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.lifecycle import plans
from LLM.listing import MODELS_ROOT
from LLM.model import Waiter
from LLM.model_service import Keeping, ModelService
from LLM.waiters import Waiters
from tests.conftest import ECHO, add_folder, eventually
from tests.makers import tiny_folder
from tests.scripted import ScriptedModel, SetClock, put, scripted
from tests.test_init import OTHER, init
from tests.test_several_models import there
from wsserver import limits
from wsserver.config import Config
from wsserver.limits import Owner

PRECISIONS = ("float32", "bfloat16", "float16")


@contextlib.asynccontextmanager
async def serving(
    *names: str, root: Path = MODELS_ROOT, **keeping: Any
) -> AsyncIterator[tuple[ModelService, list[ScriptedModel]]]:
    service = ModelService(ECHO, LoadOptions(), EngineSettings(max_queue=3), root, Keeping(**keeping))
    models = [put(service, name) for name in (ECHO, *names)]
    try:
        yield service, models
    finally:
        for model in models:
            model.open()
        await service.close()


async def load(service: ModelService, owner: str | None, name: str, **how: str) -> None:
    async with service.use(service.resolve(name, **how), Waiter(owner=owner)):
        pass


async def test_one_client_holds_no_more_models_than_its_share_and_the_default_one_stays() -> None:
    async with scripted() as (server, model), server.client() as client:
        for number, dtype in enumerate(PRECISIONS):
            await client.send(type="init", id=dtype, dtype=dtype)
            answer = await client.until("ready", "error", id=dtype)
            if number < 2:
                assert answer["type"] == "ready"
                await client.send(type="generate", id=f"g{dtype}", prompt="hello")
                await client.settle()
                await eventually(lambda n=number: len({id for s in model.steps for id in [s[0].sequence]}) > n)
        assert answer["code"] == "overloaded"
        assert "one client may use 2 models that are loaded for it alone" in answer["message"]
        assert len(server.models.status()) == 3


async def test_a_client_at_its_share_gives_its_own_idle_model_first() -> None:
    async with serving("a/a") as (service, _):
        await load(service, None, ECHO)
        await load(service, "other", "a/a", dtype="float32")
        for dtype in ("bfloat16", "float16", "auto"):
            await load(service, "me", "a/a", dtype=dtype)
        dtypes = [spec.options.dtype for spec in service._models]
        assert dtypes == ["auto", "float32", "float16", "auto"], "the default one, another client's, and two of mine"


async def test_what_others_use_too_is_not_counted() -> None:
    async with serving("a/a", "b/b", models_per_client=1) as (service, _):
        async with service.use(service.resolve("a/a"), Waiter(owner="me")):
            with pytest.raises(Refused, match="this one uses: a/a"):
                await load(service, "me", "b/b")
            async with service.use(service.resolve("a/a"), Waiter(owner="other")):
                await load(service, "me", "b/b")
        assert set(there(service)) == {"a/a", "b/b"}


async def test_the_default_and_pinned_models_leave_for_no_other_one(tmp_path: Path) -> None:
    add_folder(tmp_path, "a/a")
    async with serving("a/a", "b/b", "c/c", root=tmp_path, models=3, pin=("a/a",)) as (service, _):
        for name in (ECHO, "a/a", "b/b", "c/c"):
            await load(service, name, name)
        assert there(service) == [ECHO, "a/a", "c/c"]


async def test_what_another_client_used_a_moment_ago_leaves_last() -> None:
    async with serving("a/a", "b/b", "c/c", models=2, models_per_client=3) as (service, _):
        await load(service, "other", "a/a")
        await load(service, "me", "b/b")
        await load(service, "me", "c/c")
        assert there(service) == ["a/a", "c/c"]


async def test_a_pinned_model_stays_without_users_and_the_default_one_goes_by_keep_alive(
    tmp_path: Path,
) -> None:
    add_folder(tmp_path, "a/a")
    async with serving("a/a", root=tmp_path, pin=("a/a",), keep_alive=0.0) as (service, _):
        await load(service, None, "a/a")
        await load(service, None, ECHO)
        await eventually(lambda: there(service) == ["a/a"])


async def test_a_client_has_no_more_models_loading_at_once_than_its_share() -> None:
    async with serving("a/a", "b/b", "c/c") as (service, (_, *models)):
        for model in models:
            model.load_gate.shut()
        mine = [asyncio.create_task(load(service, "me", name)) for name in ("a/a", "b/b")]
        await models[0].in_load_stage(1)
        await models[1].in_load_stage(1)
        with pytest.raises(Refused, match="this one uses: a/a, b/b"):
            await load(service, "me", "c/c")
        # One that was cancelled has to give up first: its thread still loads.
        mine[0].cancel()
        await asyncio.wait([mine[0]])
        others = asyncio.create_task(load(service, "me", "c/c"))
        await eventually(lambda: "c/c" in there(service))
        assert models[2].loads == 0
        for model in models:
            model.open()
        await asyncio.gather(mine[1], others)
        assert (models[0].load_stages, models[2].loads) == (1, 1)


async def test_a_client_may_begin_so_many_loads_a_minute_and_is_told_when_the_next() -> None:
    async with scripted(loads_per_minute=2) as (server, model), server.client() as client:
        for dtype in PRECISIONS[:2]:
            assert (await init(client, dtype, dtype=dtype))["type"] == "ready"
        error = await init(client, "one too many", dtype="float16")
        assert (error["code"], error["retry_after_ms"] > 20_000) == ("rate_limited", True)
        assert (await init(client, "loaded", dtype=PRECISIONS[1]))["type"] == "ready"
        assert model.loads == 3


@pytest.mark.parametrize(
    ("settings", "asked", "code"),
    [
        ({"client_loads": "off"}, {"model": OTHER}, "forbidden"),
        ({"client_loads": "off", "preload": (OTHER,), "allow_load": (OTHER,)}, {"model": OTHER}, "forbidden"),
        ({"client_loads": "off"}, {"dtype": "float32"}, "forbidden"),
        ({"client_loads": "off"}, {}, None),
        ({"client_loads": "listed"}, {"model": OTHER}, "forbidden"),
        ({"client_loads": "listed", "allow_load": (OTHER,)}, {"model": OTHER}, None),
        ({"client_loads": "listed", "preload": (OTHER,)}, {"model": OTHER}, None),
        ({"client_loads": "listed", "allow_load": (OTHER,)}, {"model": OTHER, "dtype": "float32"}, "forbidden"),
        ({}, {"model": OTHER, "dtype": "float32"}, None),
    ],
)
async def test_loading_is_a_right_of_its_own(settings: dict[str, Any], asked: dict[str, str], code: str | None) -> None:
    async with scripted(loaded=False, **settings) as (server, _), server.client() as client:
        other = put(server.models, OTHER)
        answer = await init(client, "i", **asked)
        assert answer.get("code") == code
        if code:
            assert answer["message"].startswith("$.model: this server does not load that for clients")
            assert other.loads == 0
            # What is loaded already may be used.
            await server.models.get(server.models.resolve(**asked), Waiter())
            assert (await init(client, "again", **asked))["type"] == "ready"


async def test_the_folder_of_a_model_that_may_not_be_loaded_is_not_read() -> None:
    async with scripted(loaded=False, client_loads="off") as (server, _), server.client() as client:
        other = put(server.models, OTHER)
        other.plan_gate.shut()
        assert (await init(client, "i", model=OTHER))["code"] == "forbidden"


async def test_inits_are_requests_that_count() -> None:
    async with scripted(loaded=False, max_queued_per_key=3) as (server, model), server.client() as client:
        model.load_gate.shut()
        for number in range(3):
            await client.send(type="init", id=str(number))
        error = await init(client, "one too many")
        assert error["code"] == "overloaded"
        assert "3 requests of this client wait" in error["message"]
        model.open()
        await client.until("ready", id="2")
        assert (await init(client, "again"))["type"] == "ready"


async def test_no_more_inits_wait_for_a_load_than_may_stand_in_line_and_the_one_with_most_is_turned_away() -> None:
    waiters = Waiters(3, SetClock())
    load = asyncio.get_running_loop().create_future()
    told: list[str] = []

    async def wait(owner: str) -> None:
        await waiters.stand_by(Waiter(lambda stage, done: told.append(owner), owner=owner), load)

    tasks = [asyncio.create_task(wait(owner)) for owner in ("loud", "loud", "loud", "quiet", "loud")]
    await eventually(lambda: sum(task.done() for task in tasks) == 2)
    assert [task.done() for task in tasks] == [False, False, True, False, True]
    waiters.tell_progress("weights", 0.5)
    assert sorted(told) == ["loud", "loud", "quiet"]
    load.set_result(None)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [getattr(result, "reason", None) for result in results] == [None, None, "overloaded", None, "overloaded"]


@pytest.mark.parametrize("third", ["refused", "takes the place of an idle one"])
async def test_a_real_model_in_three_precisions_is_one_too_many_for_one_client(tmp_path: Path, third: str) -> None:
    tiny_folder(tmp_path / "acme" / "tiny")
    options = LoadOptions(device="cpu", kv_memory=1 << 20, threads=1)
    service = ModelService(ECHO, options, EngineSettings(1), tmp_path)
    try:
        async with service.use(service.resolve("acme/tiny", "float32"), Waiter(owner="me")):
            async with service.use(service.resolve("acme/tiny", "bfloat16"), Waiter(owner="me")):
                if third == "refused":
                    with pytest.raises(Refused, match="this one uses: acme/tiny;"):
                        await load(service, "me", "acme/tiny", dtype="float16")
                    await load(service, "other", "acme/tiny", dtype="float16")
            if third != "refused":
                await load(service, "me", "acme/tiny", dtype="float16")
        dtypes = [entry["dtype"] for entry in service.status()]
        assert dtypes == (["float32", "bfloat16", "float16"] if third == "refused" else ["float32", "float16"])
    finally:
        await service.close()


# Plans.


async def test_a_plan_that_nobody_waits_for_any_more_is_not_begun_and_few_are_made_at_once() -> None:
    names = [f"m/{number}" for number in range(plans.AT_ONCE + 2)]
    async with serving(*names) as (service, (_, *models)):
        for model in models:
            model.plan_gate.shut()
        tasks = [asyncio.create_task(load(service, name, name)) for name in names]
        await eventually(lambda: len(service._plans) == len(names))
        tasks[-1].cancel()
        await eventually(lambda: len(service._plans) == len(names) - 1)
        begun = [making.begun for making in service._plans._made.values()]
        assert begun == [True] * plans.AT_ONCE + [False]
        for model in models:
            model.open()
        await asyncio.gather(*tasks[:-1])
        assert models[-1].loads == 0


async def test_a_folder_that_hangs_takes_one_thread_and_holds_up_no_other_model() -> None:
    async with serving("a/a", "b/b", load_timeout=0.05) as (service, (_, hanging, other)):
        await load(service, None, ECHO)
        hanging.plan_gate.shut()
        for dtype in PRECISIONS:
            with pytest.raises(Refused, match=r"folder took longer than 0\.05 s"):
                await load(service, "me", "a/a", dtype=dtype)
        assert len(service._plans._hung) == 1
        assert service.problem == "reading a model's folder hangs"
        hanging.open()
        await eventually(lambda: service.problem is None)
        service._plans._timeout = 60.0
        other.open()
        await load(service, "me", "b/b")


# A load that hangs.


class Hanging(ScriptedModel):
    """Its load waits for the test, whatever is asked of it meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def load(self, folder: Path, options: LoadOptions, progress: Progress) -> LoadedModel:
        self.loads += 1
        self.goes_on.wait(60)
        return super().load(folder, options, lambda stage, done: None)


async def test_a_load_that_hangs_fails_by_name_and_its_memory_counts_until_it_has_ended() -> None:
    async with serving("b/b", load_timeout=0.05, memory=2 * ScriptedModel.memory_bytes) as (service, _):
        hanging = Hanging()
        put(service, "a/a", hanging)
        await load(service, None, ECHO)
        with pytest.raises(Refused, match="--load-timeout") as refused:
            await load(service, "me", "a/a")
        assert refused.value.reason == "load_failed"
        assert service.problem == "loading a model hangs"
        with pytest.raises(Refused, match="there is no room"):
            await load(service, "me", "b/b")
        hanging.goes_on.set()
        await eventually(lambda: service.problem is None)
        await load(service, "me", "b/b")


# Folders are read once.


class Reads:
    """Counts how often folders are read."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, folder: Path) -> model_folder.ModelFolder:
        self.count += 1
        return model_folder.read(folder)


def test_a_folder_is_read_again_only_when_a_file_of_it_changed(tmp_path: Path) -> None:
    folder, reads = tiny_folder(tmp_path), Reads()
    cache = FolderCache(reads)
    found = model_folder.read(folder)
    for _ in range(3):
        cached = cache.read(folder)
        assert (cached.config, cached.tensors) == (found.config, found.tensors)
    assert reads.count == 1
    stat = (folder / "config.json").stat()
    os.utime(folder / "config.json", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    cache.read(folder)
    assert reads.count == 2


def test_a_refusal_is_remembered_until_a_file_changes(tmp_path: Path) -> None:
    reads = Reads()
    cache = FolderCache(reads)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    for _ in range(3):
        with pytest.raises(Refused, match="damaged"):
            cache.read(tmp_path)
    assert reads.count == 1
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(101))
    with pytest.raises(Refused, match="damaged"):
        cache.read(tmp_path)
    assert reads.count == 2


def test_a_link_to_nothing_changes_nothing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "notes.txt").symlink_to(tmp_path / "gone")
    assert FolderCache().read(folder).family == "llama"


def test_few_folders_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("LLM.catalogue.folder_cache.REMEMBERED", 2)
    cache = FolderCache()
    for name in "abc":
        (tmp_path / name).mkdir()
        with pytest.raises(Refused):
            cache.read(tmp_path / name)
    assert [folder.name for folder in cache._known] == ["b", "c"]


def test_accounts_in_use_are_not_looked_at_again_for_each_newcomer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REMEMBERED", 100)
    looked = 0

    class Counted(limits.Account):
        @property
        def used(self) -> bool:
            nonlocal looked
            looked += 1
            return super().used

    monkeypatch.setattr(limits, "Account", Counted)
    accounts = limits.Accounts(Config())
    for number in range(50):
        accounts.enter(Owner("address", str(number)), 0.0)
    for number in range(50, 1000):
        accounts.of(Owner("address", str(number)))
    assert len(accounts) == 100
    assert looked < 3000
