"""How kernels are launched: early only where the GPU can do that."""

import pytest
import torch

from LLM.engine.early import launch_options

CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(("capability", "early"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_kernels_begin_early_since_hopper(capability: tuple[int, int], early: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    launch_options.cache_clear()
    options = launch_options(CUDA)
    launch_options.cache_clear()
    # What is launched early has to wait, and the other way round.
    assert options == ({"EARLY": True, "launch_pdl": True} if early else {"EARLY": False})


def test_on_a_cpu_nothing_does():
    assert launch_options(torch.device("cpu")) == {"EARLY": False}
