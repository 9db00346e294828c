"""The fake of CUDA graphs. ``fake_cuda_graph_cases.py`` tests it with Triton's kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.server.engine.model.cuda.fake_cuda_graph import RecordedGraph, as_launch


class Model(nn.Module):
    """Uses views, in-place operations, a cache and a block's usual operations. Counts its runs in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.embedding = nn.Embedding(20, 8)
        self.joined = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.cache = torch.zeros(6, 8)

    def forward(self, tokens: Tensor, slots: Tensor) -> Tensor:
        self.runs += 1
        x = self.embedding(tokens)
        q, k, v = self.joined(x).split(8, dim=-1)
        self.cache.index_copy_(0, slots, k)
        self.cache[slots] *= 0.5
        heads = [part.reshape(1, -1, 2, 4).transpose(1, 2) for part in (q, self.cache[:4], v)]
        keys, values = heads[1], heads[2].repeat_interleave(4 // len(tokens), dim=2)
        attended = functional.scaled_dot_product_attention(heads[0], keys, values)
        x += self.out(attended.transpose(1, 2).reshape(len(tokens), 8))
        x[:, :4].clamp_(min=-1.0)
        return functional.softmax(x, dim=-1)[:, 1:]


@pytest.mark.parametrize("inference", [True, False])
def test_a_replay_gives_the_models_results_without_running_its_python(inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        torch.manual_seed(0)
        model, graph = Model(), RecordedGraph()
        tokens, slots = torch.tensor([1, 2]), torch.tensor([0, 1])
        result = graph.capture(lambda: model(tokens, slots))
        for values in ([3, 4], [3, 9]):
            tokens.copy_(torch.tensor(values))
            slots.copy_(torch.tensor(values) % 5)
            before = model.cache.clone()
            graph.replay()
            ours, cache = result.clone(), model.cache.clone()
            assert model.runs == 1
            model.cache.copy_(before)
            torch.testing.assert_close(ours, model(tokens, slots))
            torch.testing.assert_close(cache, model.cache)
            model.runs = 1


def test_a_result_has_no_values_before_a_replay() -> None:
    x, graph = torch.ones(3), RecordedGraph()
    result = graph.capture(lambda: (2 * x)[1:])
    assert result.isnan().all()
    graph.replay()
    assert result.tolist() == [2.0, 2.0]


def test_a_python_value_keeps_its_recorded_value() -> None:
    x, factor, graph = torch.ones(2), 3.0, RecordedGraph()
    result = graph.capture(lambda: x * factor)
    factor = 5.0
    graph.replay()
    assert result.tolist() == [3.0, 3.0]


X = torch.arange(4.0)
IMPOSSIBLE: dict[str, Callable[[], object]] = {
    "item": lambda: X.sum().item(),
    "bool": lambda: bool(X[0] > 0),
    "int as an index": lambda: X[: int(X[1])],
    "tolist": X.tolist,
    "numpy": X.numpy,
    "cpu": X.cpu,
    "nonzero": X.nonzero,
    "masked_select": lambda: X.masked_select(X > 1),
    "a mask as an index": lambda: X[X > 1],
    "assignment by a mask": lambda: X.__setitem__(X > 1, X[:1]),
    "equal": lambda: torch.equal(X, X),
    "unique": lambda: torch.unique(X),
    "repeats that a tensor holds": lambda: X.repeat_interleave(torch.ones_like(X, dtype=torch.long)),
    "a new tensor of the host's values": lambda: X + torch.tensor([1.0]),
    "a list as an index": lambda: X[[0, 1]],
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("run", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_operations_that_a_real_capture_forbids_are_refused(
    run: Callable[[], object], inference: bool
) -> None:
    def model() -> Tensor:
        run()
        return X + 1

    with torch.inference_mode(inference), pytest.raises(RuntimeError, match="graph"):
        RecordedGraph().capture(model)
    assert X.tolist() == [0.0, 1.0, 2.0, 3.0], "the recording must have stopped"


def test_a_function_that_replaces_a_kernel_may_do_anything_and_is_repeated_whole() -> None:
    @as_launch
    def add(out: Tensor) -> None:
        out += 1

    @as_launch
    def kernel(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        for i, value in enumerate(x.tolist()):
            out[i] = value
        add(out)
        return out[:1], torch.tensor([x.sum().item()])

    x, out, graph = torch.ones(2), torch.zeros(2), RecordedGraph()
    result = graph.capture(lambda: torch.cat(kernel(x, out)))
    x.copy_(torch.tensor([2.0, 3.0]))
    graph.replay()
    assert result.tolist() == [3.0, 5.0]
    assert out.tolist() == [3.0, 4.0]
    assert kernel(x, out)[1].item() == 5.0, "outside a recording the function is unchanged"
