"""Which models there are: by their folders, by their drop-ins, and those that their operator has to help first."""

from pathlib import Path

import pytest

from LLM import model_srv_huggingfacetb_smollm2_135m_instruct as smollm2
from LLM._base_model_handler import BaseModelHandler, LoadOptions
from LLM.engine.worker import EngineSettings
from LLM.errors import Refused
from LLM.listing import drop_in_name, list_models
from LLM.model_service import ModelService
from tests.conftest import ECHO, add_folder


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
    listing = list_models(tmp_path, {"model_srv_one": One, "model_srv_two": Two, "model_srv_three": Three})
    assert listing["a/model"].problem is None
    assert listing["a/model"].handler is One
    service = ModelService(ECHO, LoadOptions(), EngineSettings())
    service.listing = listing
    for name in ("b/model", "no/folder"):
        with pytest.raises(Refused, match="all but one") as refused:
            service.resolve(name)
        assert refused.value.reason == "load_failed"
