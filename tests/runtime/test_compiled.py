from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config

from litdeploy.config.target import CompileMode
from litdeploy.errors import RunnerError
from litdeploy.networks import Network
from litdeploy.runtime import open_runner

CPU = torch.device("cpu")


def test_each_runner_compiles_each_batch_size_once(network: Network) -> None:
    graphs = []
    for _ in range(2):
        before = counters["stats"]["unique_graphs"]
        with open_runner("compiled", network=network, device=CPU) as runner:
            for size in (1, 3, 1, 3):
                runner.run(network.example(size))
        graphs.append(counters["stats"]["unique_graphs"] - before)
    assert graphs == [2, 2]


def test_more_batch_sizes_than_dynamo_keeps_are_all_compiled(network: Network) -> None:
    before = counters["stats"]["unique_graphs"]
    with dynamo_config.patch(recompile_limit=1), open_runner("compiled", network=network, device=CPU) as runner:
        for size in (1, 3, 8):
            runner.run(network.example(size))
    assert counters["stats"]["unique_graphs"] - before == 3


def test_a_size_in_another_layout_is_not_compiled_again(network: Network) -> None:
    with open_runner("compiled", network=network, device=CPU) as runner:
        batch = network.example(3)
        runner.run(batch)
        before = counters["stats"]["unique_graphs"]
        for same in (batch.to(memory_format=torch.channels_last), batch.clone().requires_grad_()):
            runner.run(same)
        assert counters["stats"]["unique_graphs"] == before


# torch 2.11's own, when Inductor packs weights for max-autotune.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_its_other_modes_compute_the_same(network: Network, mode: CompileMode, device: str) -> None:
    with open_runner("compiled", network=network, device=torch.device(device), compile_mode=mode) as runner:
        assert runner.describe().mode == f"inductor, {mode}, channels last"
        batches = [network.example(3).to(runner.device), 2 * network.example(3).to(runner.device)]
        # The first result is still there after the second call, which may run in the same memory.
        results = [runner.run(batch) for batch in batches]
    with torch.no_grad():
        for batch, logits in zip(batches, results, strict=True):
            torch.testing.assert_close(logits.cpu(), network.module(batch.cpu()), atol=1e-4, rtol=1e-4)


def test_without_a_compiler_it_says_what_to_install(network: Network, tmp_path: Path) -> None:
    with (
        inductor_config.patch({"force_disable_caches": True, "cpp.cxx": (str(tmp_path / "none"),)}),
        open_runner("compiled", network=network, device=CPU) as runner,
        pytest.raises(RunnerError, match=r"needs a C\+\+ compiler \(apt-get install g\+\+\)"),
    ):
        runner.run(network.example(2))
