from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from server.bench.errors import BenchError
from server.bench.memory import tree
from server.bench.peers import PEERS, Setup, peer
from server.bench.peers.http import HttpServer, ManyloraServer
from server.bench.peers.peft import Generator, PeftPeer, batches
from server.bench.peers.process import ChildProcess
from server.bench.serving.compare import measure, started, touching, warm_up
from server.bench.serving.stats import RunResult
from server.bench.serving.synthetic import write_adapters
from server.bench.serving.workload import Call, Load, Popularity, Workload, make_workload
from tests.support.tiny_models import TinyBase

LOAD = Load(num_prompts=5, input_len=6, output_len=3, max_concurrency=2, token_range=(10, 500))


@pytest.fixture(scope="module")
def setup(tiny_base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    scratch = tmp_path_factory.mktemp("bench")
    prepared = tiny_base("llama").prepared
    base = prepared.path
    adapters = write_adapters(prepared, scratch / "adapters", 2, rank=4, seed=0)
    return Setup(base, adapters, scratch, source=str(base), home=scratch, slots=2, context=256)


def test_synthetic_adapters_are_pefts_own(setup: Setup, tiny_base: TinyBase) -> None:
    import torch
    from peft import PeftModel

    model = tiny_base("llama").model
    tokens = torch.arange(10, 20)[None]
    with torch.inference_mode():
        plain = model(tokens).logits
        adapted = PeftModel.from_pretrained(model, setup.adapters["lora-0000"], adapter_name="one")
        adapted.load_adapter(setup.adapters["lora-0001"], adapter_name="two")
        loaded = {name for name, _ in adapted.named_parameters() if ".lora_B.one." in name}
        logits = [plain]
        for name in ("one", "two"):
            adapted.set_adapter(name)
            logits.append(adapted(tokens).logits)
        adapted.unload()
    assert len(loaded) == len(tiny_base("llama").layout.sites)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(logits[a], logits[b])


@pytest.fixture(scope="module")
def generator(setup: Setup) -> Generator:
    return Generator(setup.base, {name: str(folder) for name, folder in setup.adapters.items()})


@pytest.mark.parametrize("popularity", ["distinct", "identical", "base"])
def test_peft_answers_any_batch(generator: Generator, setup: Setup, popularity: Popularity) -> None:
    workload = make_workload(replace(LOAD, popularity=popularity), tuple(setup.adapters), run=1)
    records = generator.answer(workload)
    assert len(records) == 5
    for record in records:
        assert (record.prompt_tokens, record.output_tokens, len(record.chunks)) == (6, 3, 3)
        assert record.sent < record.first < record.last


def test_peft_cannot_be_asked_to_wait_for_arrivals() -> None:
    with pytest.raises(BenchError, match="request-rate inf"):
        PeftPeer().run(Workload((Call(None, (1,), 1, due=1.0),)))


def test_peft_batches_are_as_large_as_the_concurrency() -> None:
    calls = tuple(Call(None, (token,), 1) for token in range(5))
    assert [len(batch) for batch in batches(Workload(calls, 2))] == [2, 2, 1]
    assert [len(batch) for batch in batches(Workload(calls))] == [5]


def test_the_error_of_a_peer_that_ends_has_the_reason(tmp_path: Path) -> None:
    child = ChildProcess([sys.executable, "-c", "raise SystemExit('no room')"], tmp_path / "log", talk=True)
    with pytest.raises(BenchError, match="no room"):
        child.ask("ready?")
    child.stop()


class Fake(HttpServer):
    name = "fake"

    def command(self, setup: Setup, port: int) -> list[str]:  # noqa: ARG002
        return [sys.executable, "-m", "tests.server.bench.fake_server", str(port)]


class Failing(HttpServer):
    name = "failing"

    def command(self, setup: Setup, port: int) -> list[str]:  # noqa: ARG002
        return [sys.executable, "-c", "raise SystemExit('no room')"]


def test_a_started_server_is_measured_in_turn_and_stopped(setup: Setup) -> None:
    class Spy(Fake):
        def run(self, workload: Workload) -> RunResult:
            order.append(self.name)
            return super().run(workload)

    class Other(Spy):
        name = "other"

    order: list[str] = []
    one, other = Spy(), Other()
    with started([one, other], setup):
        warm_up([one, other], setup, LOAD, num_warmups=1)
        measured = measure([one, other], setup, [LOAD, LOAD], repeats=2)
    assert order == ["fake", "other"] * 4  # one request to each adapter, the warm-up, two runs
    assert [[run["completed"] for run in each.runs] for each in measured] == [[5, 5], [5, 5]]
    with pytest.raises(BenchError, match="ended with code"):
        one._process.check_alive()  # type: ignore[union-attr]


def test_a_server_that_ends_at_once_is_reported(setup: Setup) -> None:
    with pytest.raises(BenchError, match="no room"), started([Failing()], setup):
        pytest.fail("it must not have started")


def test_the_warm_up_reaches_every_adapter_once(setup: Setup) -> None:
    load = touching(replace(LOAD, popularity="zipf", num_adapters=1, request_rate=3.0), count=2)
    calls = make_workload(load, tuple(setup.adapters), run=-1).calls
    assert [call.adapter for call in calls] == list(setup.adapters)
    assert {call.due for call in calls} == {0}


def test_a_child_is_killed_with_its_own_children(tmp_path: Path) -> None:
    script = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    child = ChildProcess([sys.executable, "-c", script], tmp_path / "log", talk=True)
    grandchild = int(child.ask(""))
    assert grandchild in tree(child.pid)
    child.stop()
    for _ in range(500):  # a signal takes some time
        if not alive(grandchild):
            break
        time.sleep(0.01)
    assert not alive(grandchild)


def alive(pid: int) -> bool:
    """Whether the process runs. A zombie does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_our_servers_command(setup: Setup) -> None:
    command = ManyloraServer(server_args=["--max-loras", "3"]).command(setup, 1234)
    assert command[1:4] == ["-m", "server.cli", "serve"]
    assert command[command.index("--base") + 1] == str(setup.base)
    assert command[-2:] == ["--max-loras", "3"]


def test_every_listed_peer_exists() -> None:
    assert [peer(name).name for name in PEERS] == list(PEERS)
    assert peer("llama.cpp:q4_0").name == "llama.cpp:q4_0"
    for wrong in ("ollama", "llama.cpp:q5_9", "vllm:fast", "peft:x"):
        with pytest.raises(BenchError, match="known"):
            peer(wrong)
