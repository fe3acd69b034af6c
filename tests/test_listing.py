"""Which models there are: by their folders, by their drop-ins, and those that their operator has to help first."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from LLM import drop_ins
from LLM import model_srv_huggingfacetb_smollm2_135m_instruct as smollm2
from LLM._base_model_handler import BaseModelHandler, LoadOptions
from LLM.drop_ins import DropIn
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.listing import MODELS_ROOT, drop_in_name, list_models
from LLM.model_service import ModelService
from tests.conftest import DEFAULT_MODEL, ECHO, add_folder


@pytest.fixture(autouse=True)
def _modules() -> Iterator[None]:
    """Forget the drop-ins that a test has imported by path."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("model_srv_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("model_id", "module"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", "model_srv_mistralai_mistral_7b_instruct_v0_3"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "model_srv_huggingfacetb_smollm2_135m_instruct"),
        ("wsserver/echo", "model_srv_wsserver_echo"),
        ("a/B--1.0+", "model_srv_a_b_1_0"),
    ],
)
def test_a_drop_ins_file_name_is_its_model_id(model_id: str, module: str) -> None:
    assert drop_in_name(model_id) == module


def test_a_listing_holds_folders_with_a_config_and_drop_ins_that_need_none(tmp_path: Path) -> None:
    add_folder(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct")
    add_folder(tmp_path, "vendor/unknown-model")
    add_folder(tmp_path, "too/deep/for-a-model")
    (tmp_path / "vendor" / "no-config").mkdir()
    (tmp_path / "vendor" / "config.json").write_text("{}")
    listing = list_models(tmp_path)
    assert listing.keys() == {ECHO, "HuggingFaceTB/SmolLM2-135M-Instruct", "vendor/unknown-model"}
    assert listing["vendor/unknown-model"].handler is BaseModelHandler
    assert listing["vendor/unknown-model"].folder == tmp_path / "vendor" / "unknown-model"
    assert listing["HuggingFaceTB/SmolLM2-135M-Instruct"].handler is smollm2.ModelHandler


def test_a_folder_that_is_a_link_out_of_the_root_is_refused_with_what_to_do(tmp_path: Path) -> None:
    add_folder(tmp_path, "elsewhere/vendor/model")
    root = tmp_path / "root"
    add_folder(root, "vendor/real")
    (root / "vendor" / "out").symlink_to(tmp_path / "elsewhere" / "vendor" / "model")
    (root / "away").symlink_to(tmp_path / "elsewhere" / "vendor")
    (root / "vendor" / "within").symlink_to(root / "vendor" / "real")
    service = ModelService(ECHO, LoadOptions(), EngineSettings(), root)
    assert service.resolve("vendor/within").model == "vendor/within"
    for name in ("vendor/out", "away/model"):
        with pytest.raises(Refused, match="operator can move the model itself there") as refused:
            service.resolve(name)
        assert refused.value.reason == "load_failed"
        assert str(tmp_path) not in refused.value.message


def test_a_model_that_two_drop_ins_claim_is_refused_with_what_to_do(tmp_path: Path) -> None:
    class One(BaseModelHandler):
        also_listed_as = ("a/model", "b/model")

    class Two(BaseModelHandler):
        also_listed_as = ("b/model",)
        model_ids = ("no/folder",)

    class Three(BaseModelHandler):
        model_ids = ("no/folder",)

    add_folder(tmp_path, "a/model")
    made = {f"model_srv_{handler.__name__.lower()}": DropIn(handler) for handler in (One, Two, Three)}
    listing = list_models(tmp_path, made)
    assert listing["a/model"].problem is None
    assert listing["a/model"].handler is One
    service = ModelService(ECHO, LoadOptions(), EngineSettings())
    service.listing = listing
    for name in ("b/model", "no/folder"):
        with pytest.raises(Refused, match="all but one") as refused:
            service.resolve(name)
        assert refused.value.reason == "load_failed"


@pytest.mark.parametrize("sign", ["model.safetensors", "model-q4.gguf", "pytorch_model.bin"])
def test_a_folder_with_weights_is_a_model_even_if_its_config_is_missing(tmp_path: Path, sign: str) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "model" / sign).touch()
    assert "a/model" in list_models(tmp_path)


def test_what_is_hidden_is_no_model(tmp_path: Path) -> None:
    add_folder(tmp_path, ".partial/model")
    add_folder(tmp_path, "a/.model")
    assert list_models(tmp_path).keys() == {ECHO}


def test_the_folders_of_the_package_itself_are_no_models() -> None:
    assert not [name for name in list_models(MODELS_ROOT) if name.startswith("engine/")]


# The operator's own drop-ins.


def write(root: Path, name: str, text: str) -> None:
    (root / f"{name}.py").write_text("from LLM._base_model_handler import BaseModelHandler\n" + text)


def test_an_operators_drop_in_is_its_folders_and_may_state_names(tmp_path: Path) -> None:
    add_folder(tmp_path, "acme/Tiny-1.0")
    facts = "class ModelHandler(BaseModelHandler):\n    also_listed_as = ('acme/Tiny-1.0', 'acme/tiny')\n"
    write(tmp_path, "model_srv_acme_tiny_1_0", facts)
    listing = list_models(tmp_path)
    assert listing.keys() == {"acme/Tiny-1.0", "acme/tiny", ECHO}
    assert listing["acme/tiny"] == listing["acme/Tiny-1.0"]
    assert listing["acme/Tiny-1.0"].handler.also_listed_as == ("acme/Tiny-1.0", "acme/tiny")


BROKEN = {
    "half a line": "class ModelHandler(",
    "an exception": "raise OSError('/home/secret')",
    "an end of the process": "import sys\nsys.exit(3)",
    "no class": "handler = BaseModelHandler",
    "a class of another kind": "class ModelHandler: pass",
    "an instance": "class Mine(BaseModelHandler): pass\nModelHandler = Mine()",
    "a name for names": "class ModelHandler(BaseModelHandler):\n    model_ids = 'acme/tiny'",
    "an unknown parameter": "class ModelHandler(BaseModelHandler):\n    sampling = {'temprature': 1}",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_the_models_of_a_drop_in_that_cannot_be_imported_are_refused_and_the_log_has_its_traceback(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    add_folder(tmp_path, "acme/tiny")
    add_folder(tmp_path, "acme/other")
    write(tmp_path, "model_srv_acme_tiny", text)
    service = ModelService(ECHO, LoadOptions(), EngineSettings(), tmp_path)
    with pytest.raises(Refused, match="can mend it and restart") as refused:
        service.resolve("acme/tiny")
    assert refused.value.reason == "load_failed"
    assert str(tmp_path) not in refused.value.message
    assert service.resolve("acme/other").model == "acme/other"
    [record] = [record for record in caplog.records if record.exc_info]
    assert str(tmp_path / "model_srv_acme_tiny.py") in record.getMessage()


def test_one_among_the_servers_own_that_cannot_be_imported_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop_ins, "PACKAGE", tmp_path)
    add_folder(tmp_path, "acme/tiny")
    add_folder(tmp_path, "acme/other")
    write(tmp_path, "model_srv_acme_tiny", "")  # it is not in the package, and so cannot be imported by name
    listing = list_models(tmp_path)
    assert (listing["acme/tiny"].problem, listing["acme/other"].problem) == (drop_ins.BROKEN, None)


def test_an_operators_drop_in_takes_the_place_of_the_one_of_its_name(tmp_path: Path) -> None:
    add_folder(tmp_path, DEFAULT_MODEL)
    write(tmp_path, drop_in_name(DEFAULT_MODEL), "class ModelHandler(BaseModelHandler):\n    sampling = {'top_k': 7}\n")
    assert list_models(tmp_path)[DEFAULT_MODEL].handler.sampling == {"top_k": 7}


def test_one_that_takes_a_place_but_cannot_be_imported_leaves_nobody_in_it(tmp_path: Path) -> None:
    add_folder(tmp_path, "meta-llama/Llama-3.2-3B-Instruct")
    write(tmp_path, "model_srv_llama_llama_3_2_3b_instruct", "1 / 0")
    write(tmp_path, "model_srv_wsserver_echo", "1 / 0")
    listing = list_models(tmp_path)
    for name in ("meta-llama/Llama-3.2-3B-Instruct", "llama/Llama-3.2-3B-Instruct", ECHO):
        assert listing[name].problem == drop_ins.BROKEN


def test_a_model_that_an_operators_drop_in_and_the_packages_claim_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "model_srv_mine", f"class ModelHandler(BaseModelHandler):\n    model_ids = ('{ECHO}', 'my/own')\n")
    listing = list_models(tmp_path)
    assert "giving the other its file name" in str(listing[ECHO].problem)
    assert listing["my/own"].problem is None


def test_a_drop_in_that_is_a_link_out_of_the_root_is_never_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("a/model", "a/circle", "a/within"):
        add_folder(root, name)
    elsewhere.mkdir()
    write(elsewhere, "model_srv_a_model", f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    write(root, "of_two_names", "class ModelHandler(BaseModelHandler): pass")
    (root / "model_srv_a_model.py").symlink_to(elsewhere / "model_srv_a_model.py")
    (root / "model_srv_a_circle.py").symlink_to(root / "model_srv_a_circle.py")
    (root / "model_srv_a_within.py").symlink_to(root / "of_two_names.py")
    listing = list_models(root)
    assert listing["a/model"].problem == drop_ins.OUTSIDE
    assert listing["a/circle"].problem == drop_ins.BROKEN
    assert listing["a/within"].problem is None
    assert not (tmp_path / "sprung").exists()
    assert str(root / "model_srv_a_model.py") in caplog.text


def test_a_drop_in_that_is_for_no_model_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_folder(tmp_path, "a/model")
    for name in ("model_srv_a_model", "model_srv_a_Model", "model_srv_gone"):
        write(tmp_path, name, "class ModelHandler(BaseModelHandler): pass")
    list_models(tmp_path)
    warned = [record.getMessage().partition(" ")[0] for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["model_srv_a_Model.py", "model_srv_gone.py"]


def test_a_drop_ins_module_is_found_by_its_name_as_a_dataclass_wants(tmp_path: Path) -> None:
    text = """from __future__ import annotations
from dataclasses import dataclass
from LLM.model_srv_huggingfacetb_smollm2_135m_instruct import ModelHandler as Theirs

@dataclass
class Facts:
    top_k: int = 3

class ModelHandler(Theirs):
    sampling = {"top_k": Facts().top_k}
"""
    add_folder(tmp_path, "acme/tiny")
    (tmp_path / "model_srv_acme_tiny.py").write_text(text)
    assert list_models(tmp_path)["acme/tiny"].handler.sampling == {"top_k": 3}
