"""Operators, clients and accidents in any order, with a whole server on a tiny base.

These must always hold. No answer has status 500. A good folder is served soon. An answer comes from the
version that its name means. No client changes an operator's folder. A good job succeeds, and its model still
answers after a restart. An idle server holds no resources.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.e2e.stateful.damage import ANY_JSON, ANY_TEXT, DAMAGES, Damage
from tests.e2e.stateful.world import VARIANTS, World, content, remove, within

SERVED_SECONDS = 2.0
"""The promised time in which a good folder is served."""
SLACK_SECONDS = 3.0
"""More time, because the machine may do other work."""
JOB_SECONDS = 30.0

OPERATORS = st.sampled_from(["acme", "beta", "Acme", "a.b-c_d"])
JOB_NAMES = st.sampled_from(["job-a", "job-b"])
HIDDEN = st.sampled_from(["acme.tmp", "beta.partial", ".acme", "acme.tmp.tmp"])
NUMBERS = st.integers(0, VARIANTS - 1)
ROWS = json.dumps(
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
).encode()
RECIPES = st.dictionaries(
    st.sampled_from(["r", "alpha", "target_modules", "suffix", "name", "seed", "metadata", "adapter_method",
                     "method", "hyperparameters", "max_seq_len", "learning_rate", "validation_file"]),
    ANY_JSON,
    max_size=3,
)  # fmt: skip
ROUTES = st.sampled_from(
    ["chat/completions", "completions", "load_lora_adapter", "unload_lora_adapter", "fine_tuning/jobs"]
)
FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "n", "temperature", "top_p", "top_k", "stop", "logit_bias", "max_tokens",
     "stream", "seed", "repetition_penalty", "min_p", "logprobs", "lora_name", "lora_path", "training_file"]
)  # fmt: skip


@dataclass
class Name:
    """The expected state of one name.

    Attributes:
        digest: the version that must answer; None = none, or unknown (``damaged``).
        source: the hash that the operator's folder must keep; None = not an operator's folder.
        recent: the versions since the server was last known to be up to date.
        damaged: whether the folder was changed. Then it may answer, or give a reason why not.
    """

    digest: str | None = None
    source: str | None = None
    recent: set[str] = field(default_factory=set)
    damaged: bool = False


class Machine(RuleBasedStateMachine):
    world: World

    @initialize()
    def empty(self) -> None:
        self.names: dict[str, Name] = {}
        self.jobs: dict[str, str] = {}  # id -> the name under which its model must be served
        self.odd_jobs: set[str] = set()

    # -- operators --------------------------------------------------------------------------------

    @rule(name=OPERATORS, number=NUMBERS)
    def deploy(self, name: str, number: int) -> None:
        self.world.deploy(self.world.variants[number], name)
        self._now(name, self.world.digests[number], content(self.world.variants[number]))

    @rule(name=OPERATORS, number=NUMBERS)
    def write_in_place(self, name: str, number: int) -> None:
        remove(self.world.adapters / name)
        shutil.copytree(self.world.variants[number], self.world.adapters / name)
        self._now(name, self.world.digests[number], content(self.world.variants[number]))

    @rule(name=OPERATORS)
    def remove(self, name: str) -> None:
        remove(self.world.adapters / name)
        self._now(name, None, None)

    @rule(old=OPERATORS, new=OPERATORS)
    def rename(self, old: str, new: str) -> None:
        known = self.names.get(old)
        if known is None or known.source is None or old == new:
            return
        digest, source = known.digest, known.source
        remove(self.world.adapters / new)
        (self.world.adapters / old).rename(self.world.adapters / new)
        self._now(old, None, None)
        self._now(new, digest, source)

    @rule(name=OPERATORS, number=NUMBERS, damage=DAMAGES, in_place=st.booleans())
    def damage(self, name: str, number: int, damage: Damage, in_place: bool) -> None:
        source = self.world.folder / "damaged"
        remove(source)
        shutil.copytree(self.world.variants[number], source)
        if in_place:
            remove(self.world.adapters / name)
            shutil.copytree(source, self.world.adapters / name)
            damage(self.world.adapters / name)
        else:
            damage(source)
            staged = self.world.adapters / f".{name}.damaged.tmp"
            remove(staged)
            source.rename(staged)
            remove(self.world.adapters / name)
            staged.rename(self.world.adapters / name)
        self._now(name, None, None)
        self.names[name].damaged = True

    @rule(
        name=st.binary(min_size=1, max_size=40),
        kind=st.sampled_from(["folder", "file", "link", "loop", "fifo"]),
    )
    def odd_entry(self, name: bytes, kind: str) -> None:
        """Create an entry with any bytes as its name in the adapter directory."""
        path = Path(
            os.fsdecode(bytes(self.world.adapters) + b"/odd" + name.replace(b"/", b"_").replace(b"\0", b"_"))
        )
        if os.path.lexists(path):
            return
        if kind == "folder":
            shutil.copytree(self.world.variants[0], path)
        elif kind == "file":
            path.write_bytes(b"x")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(path.name if kind == "loop" else self.world.variants[0])

    @rule(name=HIDDEN, number=NUMBERS)
    def hidden_folder(self, name: str, number: int) -> None:
        path = self.world.adapters / name
        remove(path)
        shutil.copytree(self.world.variants[number], path)

    # -- clients ----------------------------------------------------------------------------------

    @rule(name=st.one_of(OPERATORS, JOB_NAMES, HIDDEN, st.just("tiny"), ANY_TEXT), stream=st.booleans())
    def chat(self, name: str, stream: bool) -> None:
        reply = self._ask(name, stream=stream)
        if reply.status_code != 200 or name == "tiny" or name not in self.names:
            assert name != "tiny" or reply.status_code == 200, reply.text
            assert reply.status_code in (200, 400, 404, 409, 429, 503), reply.text
            return
        known = self.names[name]
        if not known.damaged:
            made_by_job = {self.world.digests[-1]} if name in self.jobs.values() else set()
            possible = {digest[:12] for digest in known.recent | made_by_job}
            assert _digest(reply) in possible, (name, known, reply.text)

    @rule(route=ROUTES, body=st.dictionaries(st.one_of(FIELDS, ANY_TEXT), ANY_JSON, max_size=5))
    def odd_body(self, route: str, body: dict[str, Any]) -> None:
        reply = self._post(f"/v1/{route}", body)
        if route == "fine_tuning/jobs" and reply.status_code == 200:
            self.odd_jobs.add(reply.json()["id"])
        if route == "unload_lora_adapter" and reply.status_code == 200:
            self._now(body["lora_name"], None, None)

    @rule(name=st.one_of(OPERATORS, ANY_TEXT), path=st.one_of(OPERATORS, HIDDEN, ANY_TEXT))
    def load(self, name: str, path: str) -> None:
        reply = self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        if reply.status_code == 200 and name != path:
            self._post("/v1/unload_lora_adapter", {"lora_name": name})

    @rule(name=st.one_of(OPERATORS, JOB_NAMES, ANY_TEXT.filter(lambda text: text.isprintable())))
    def delete_model(self, name: str) -> None:
        reply = self._call("DELETE", f"/v1/models/{quote(name, errors='replace')}")
        if reply.status_code == 200:
            assert name not in self.names or self.names[name].source is None, (
                "a client deleted an operator's adapter"
            )
            self._now(name, None, None)

    # -- jobs -------------------------------------------------------------------------------------

    @rule(name=st.one_of(JOB_NAMES, OPERATORS), rows=st.integers(1, 12))
    def create_job(self, name: str, rows: int) -> None:
        file = self._upload(b"\n".join([ROWS] * rows))
        body = {"model": "tiny", "training_file": file.json()["id"], "name": name, "seed": 1}
        reply = self._post("/v1/fine_tuning/jobs", body)
        known = self.names.get(name)
        if known is not None and known.source is not None and not known.damaged and self._is_up_to_date(name):
            assert reply.status_code == 400, "a job may not take an operator's name"
        if reply.status_code == 200:
            self.jobs[reply.json()["id"]] = name

    @rule(recipe=RECIPES)
    def create_odd_job(self, recipe: dict[str, Any]) -> None:
        file = self._upload(ROWS)
        body = {"model": "tiny", "training_file": file.json()["id"], **recipe}
        reply = self._post("/v1/fine_tuning/jobs", body)
        if reply.status_code == 200:
            self.odd_jobs.add(reply.json()["id"])

    @rule(data=st.one_of(st.binary(max_size=200), ANY_JSON.map(lambda value: json.dumps(value).encode())))
    def odd_file(self, data: bytes) -> None:
        self._upload(data)

    @rule(action=st.sampled_from(["pause", "resume", "cancel"]), which=st.integers(0, 3))
    def steer_job(self, action: str, which: int) -> None:
        for job in sorted(self.jobs)[which : which + 1]:
            self._call("POST", f"/v1/fine_tuning/jobs/{job}/{action}")

    # -- accidents --------------------------------------------------------------------------------

    @rule(number=st.sampled_from([signal.SIGTERM, signal.SIGKILL]))
    def restart(self, number: signal.Signals) -> None:
        self.world.end(number)
        self.world.start()

    # -- invariants -------------------------------------------------------------------------------

    @rule()
    def settle(self) -> None:
        """Check that the server is up to date within the promised time."""
        deadline = time.monotonic() + SERVED_SECONDS + SLACK_SECONDS
        for name, known in self.names.items():
            if known.damaged or name in self.jobs.values():
                continue
            served = within(partial(self._serves, name, known.digest), deadline - time.monotonic())
            assert served, (name, known, self.world.listing())
            known.recent = {known.digest} if known.digest else set()

    @invariant()
    def answers(self) -> None:
        for path in ("/health", "/v1/models", "/v1/adapters", "/v1/fine_tuning/jobs", "/v1/files"):
            assert self._call("GET", path).status_code == 200

    @invariant()
    def operators_folders_stay(self) -> None:
        for name, known in self.names.items():
            if known.source is not None:
                assert content(self.world.adapters / name) == known.source, f"a client changed {name}"

    def teardown(self) -> None:
        if not hasattr(self, "names"):
            return
        try:
            self.settle()
            self._jobs_end_well()
            self._nothing_is_held()
        finally:
            self._clean_up()

    # -- helpers ----------------------------------------------------------------------------------

    def _now(self, name: str, digest: str | None, source: str | None) -> None:
        known = self.names.setdefault(name, Name())
        known.digest, known.source, known.damaged = digest, source, False
        known.recent |= {digest} if digest else set()

    def _call(self, method: str, path: str, **options: Any) -> httpx.Response:
        reply = self.world.http.request(method, path, **options)
        assert reply.status_code < 500 or reply.status_code == 503, (method, path, options, reply.text)
        if reply.status_code >= 400:
            error = reply.json()["error"]
            assert isinstance(error["message"], str), reply.text
        return reply

    def _post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """POST JSON with lone surrogates escaped. The encoder of httpx cannot do this."""
        return self._call(
            "POST", path, content=json.dumps(body), headers={"Content-Type": "application/json"}
        )

    def _ask(self, name: str, **more: Any) -> httpx.Response:
        body = {
            "model": name,
            "messages": [{"role": "user", "content": "la"}],
            "max_tokens": 2,
            "temperature": 0,
        }
        return self._post("/v1/chat/completions", body | more)

    def _upload(self, data: bytes) -> httpx.Response:
        return self._call(
            "POST", "/v1/files", files={"file": ("train.jsonl", data)}, data={"purpose": "fine-tune"}
        )

    def _is_up_to_date(self, name: str) -> bool:
        row = self.world.listing().get(name)
        return row is not None and row["digest"] == self.names[name].digest

    def _serves(self, name: str, digest: str | None) -> bool:
        """Whether the name answers with that version; None = whether the model is not found."""
        reply = self._ask(name)
        if digest is None:
            return reply.status_code == 404
        return reply.status_code == 200 and _digest(reply) == digest[:12]

    def _jobs_end_well(self) -> None:
        for job in self.jobs:
            if self._status(job) == "paused":
                self._call("POST", f"/v1/fine_tuning/jobs/{job}/resume")
        unended = {*self.jobs, *self.odd_jobs}
        done = within(lambda: all(self._status(job) in _ENDS for job in unended), JOB_SECONDS)
        assert done, [self._call("GET", f"/v1/fine_tuning/jobs/{job}").json() for job in unended]
        succeeded = {name for job, name in self.jobs.items() if self._status(job) == "succeeded"}
        free = succeeded - set(self.names)
        self.restart(signal.SIGTERM)
        for name in free:
            assert within(partial(self._serves, name, self.world.digests[-1]), 5), name
        for job, name in self.jobs.items():
            status = self._status(job)
            assert name in self.names or status in ("succeeded", "cancelled"), (job, name, status)

    def _status(self, job: str) -> str:
        return str(self._call("GET", f"/v1/fine_tuning/jobs/{job}").json()["status"])

    def _nothing_is_held(self) -> None:
        assert within(lambda: all(self.world.metric(name) == 0 for name in _HELD), 5), [
            (name, self.world.metric(name)) for name in _HELD
        ]
        log = self.world.log.read_text(errors="replace")
        assert "unexpectedly" not in log, log[log.index("unexpectedly") :][:3000]
        assert "trying again" not in log, log[log.index("trying again") :][:3000]

    def _clean_up(self) -> None:
        for path in list(self.world.adapters.iterdir()):
            remove(path)
        self.world.end(signal.SIGKILL)
        for name in ("state.sqlite3", "state.sqlite3-wal", "state.sqlite3-shm", "jobs", "files"):
            remove(self.world.home / name)
        self.world.log.unlink(missing_ok=True)
        self.world.start()


_ENDS = ("succeeded", "failed", "cancelled")
_HELD = ("requests_running", "requests_waiting", "kv_blocks_used")


def _digest(reply: httpx.Response) -> str:
    """The 12 digits of the adapter's digest in the fingerprint of an answer or its first chunk."""
    text = reply.text.split("data: ")[1] if reply.text.startswith("data: ") else reply.text
    return str(json.loads(text)["system_fingerprint"]).rpartition("-lora-")[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


def _run(world: World, examples: int, steps: int, derandomize: bool) -> None:
    class OfWorld(Machine):
        pass

    OfWorld.world = world
    run_state_machine_as_test(
        OfWorld,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=derandomize,
            phases=(
                Phase.reuse,
                Phase.generate,
            ),  # shrinking would take hours, and the steps are printed without it
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(600)
def test_random_events(world: World) -> None:
    _run(world, examples=4, steps=20, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_events(world: World) -> None:
    _run(world, examples=150, steps=40, derandomize=False)
