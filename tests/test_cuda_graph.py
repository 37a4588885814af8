"""A recorded iteration is the iteration, or it is not used: with recorders that need no GPU."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import engine.cuda_graph as module
from engine.cuda_graph import CudaGraph, record
from tests.replay import Replay


def test_a_recorded_function_is_the_function():
    def iterate_on(state):
        def iterate(batch):
            state.mul_(0.5).add_(batch[0])
            return state.sum(), 3 * batch[1]

        return iterate

    batches = [(torch.full((2,), float(number)), torch.arange(3) + number) for number in range(4)]
    states = [torch.ones(2), torch.ones(2)]
    eager, recorded = iterate_on(states[0]), record(iterate_on(states[1]), states[1:], batches[0], Replay())
    assert torch.equal(*states), "the warm-up leaves no trace"
    expected = [tuple(part.clone() for part in eager(batch)) for batch in batches]
    results = [recorded(batch) for batch in batches]  # kept: a result must outlive the next replay
    for one, other in zip(expected, results, strict=True):
        assert all(map(torch.equal, one, other))
    assert torch.equal(*states) and batches[3][0].tolist() == [3, 3]


# ---- what cannot be recorded, or is recorded wrongly


def halve(state):
    def iterate(batch):
        state.mul_(0.5).add_(batch[0].mean())
        return (state.sum(),)

    return iterate


BATCH = (torch.arange(4.0),)


class Failing(Replay):
    """Its recording fails halfway, with the state changed."""

    def record(self, work):
        super().record(work)
        torch.rand(1)
        raise RuntimeError("operation not permitted when stream is capturing\nMore lines.")


class FailingTwice(Failing):
    """So does the end of its recording, as that of a CUDA graph."""

    def record(self, work):
        try:
            super().record(work)
        finally:
            raise RuntimeError("operation failed due to a previous error")


class Forgetful(Replay):
    """Leaves the first operation out."""

    def replay(self):
        del self.calls[:1]
        super().replay()


class Stale(Replay):
    """Never repeats anything."""

    def replay(self):
        pass


class Diverging(Replay):
    """Has a result that is not even a number."""

    def replay(self):
        super().replay()
        self.calls[-1][-1].fill_(torch.nan)


@pytest.mark.parametrize(
    ("recorder", "line"),
    [
        (Failing, r"cannot be recorded (RuntimeError: operation not permitted when stream is capturing)"),
        (FailingTwice, r"cannot be recorded (RuntimeError: operation not permitted when stream is capturing)"),
        (Forgetful, "warning: no CUDA graph, so this takes longer: the recorded iteration gave other numbers"),
        (Stale, "warning: no CUDA graph"),
        (Diverging, "warning: no CUDA graph"),
    ],
)
def test_the_loop_goes_on_without_a_recording_from_where_it_was(recorder, line, capsys):
    state, random = torch.ones(3, requires_grad=True), torch.get_rng_state()
    iterate = halve(state.detach())
    assert record(iterate, [state], BATCH, recorder()) is iterate
    assert state.tolist() == [1, 1, 1] and torch.equal(torch.get_rng_state(), random)
    printed = capsys.readouterr().out
    assert line in printed and printed.count("\n") == 1


def test_a_good_recording_says_nothing_and_leaves_no_trace(capsys):
    state, random = torch.ones(3), torch.get_rng_state()
    iterate = halve(state)
    assert record(iterate, [state], BATCH, Replay()) is not iterate
    assert state.tolist() == [1, 1, 1] and torch.equal(torch.get_rng_state(), random)
    assert capsys.readouterr().out == ""


def test_an_iteration_that_fails_without_a_recording_is_an_error():
    def iterate(batch):
        raise ValueError("of the network itself")

    with pytest.raises(ValueError, match="of the network itself"):
        record(iterate, [], BATCH, Replay())


def test_random_numbers_are_drawn_alike_while_comparing(capsys):
    state = torch.ones(50)

    def iterate(batch):
        state.copy_(F.dropout(state))
        return (state.sum(),)

    assert record(iterate, [state], BATCH, Replay()) is not iterate
    assert capsys.readouterr().out == ""


def test_values_that_are_not_finite_are_no_difference():
    def iterate(batch):
        return batch[0] / 0, 0 / batch[0], batch[0].argmax()

    assert record(iterate, [], BATCH, Replay()) is not iterate


def test_a_state_alone_that_comes_out_wrong_is_noticed():
    class Unfinished(Replay):
        def replay(self):
            self.calls = self.calls[:-1]
            super().replay()

    state = torch.ones(3)

    def iterate(batch):
        total = batch[0].sum()
        state.add_(total)
        return (total,)

    assert record(iterate, [state], BATCH, Unfinished()) is iterate


@pytest.mark.parametrize(("off", "used"), [(0, True), (5e-6, True), (1e-3, False)])
def test_a_replay_may_differ_as_the_loop_differs_from_itself(off, used):
    """Two runs of this loop differ by 1e-6, as those of a network whose sums have no fixed order."""
    runs = iter(range(100))

    def iterate(batch):
        return (batch[0] + 1e-6 * next(runs),)

    class Off(Replay):
        def replay(self):
            super().replay()
            self.calls[-1][-1].add_(off)

    assert (record(iterate, [], (torch.ones(2),), Off()) is not iterate) == used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_else_it_may_not_differ_by_a_single_bit(dtype):
    class Off(Replay):
        def replay(self):
            super().replay()
            self.calls[-1][-1].view(torch.int16)[0] += 1

    def iterate(batch):
        return (3 * batch[0],)

    assert record(iterate, [], (torch.ones(2, dtype=dtype),), Off()) is iterate


# ---- CUDA's part, with the names of torch.cuda standing for what they do


class Device:
    """Streams, the mode in which waiting is an error, and a capture that PyTorch cannot end properly once it failed."""

    def __init__(self, patch):
        self.main, self.current, self.mode, self.events = "main", "main", 0, []
        self.renewed, self.capturing = [], False
        owner = self

        class Stream:
            def wait_stream(self, other):
                owner.events.append(("side waits for", other))

        class Main:
            def wait_stream(self, other):
                owner.events.append(("main waits for", other))

        @contextmanager
        def stream(chosen):
            before, owner.current = owner.current, chosen
            try:
                yield
            finally:
                owner.current = before

        class Graph:
            def __init__(self, graph, stream):
                self.stream = stream

            def __enter__(self):
                owner.current, owner.capturing = self.stream, True

            def __exit__(self, kind, *_):
                owner.capturing = False
                if kind:
                    owner.current = "the stream of a failed capture"
                    raise RuntimeError("capture_end")

        for name, value in {
            "Stream": Stream,
            "current_stream": lambda: Main(),
            "stream": stream,
            "graph": Graph,
            "CUDAGraph": lambda: None,
            "get_sync_debug_mode": lambda: owner.mode,
            "set_sync_debug_mode": lambda mode: setattr(owner, "mode", mode),
            "get_rng_state": lambda: "state before",
        }.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(module, "_renew_generator", self.renewed.append)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_what_waits_for_the_device_is_found_before_anything_is_captured(device):
    def work():
        if device.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        assert not device.capturing
        return ()

    graph = CudaGraph()
    assert graph.warm_up(work) == ()
    with pytest.raises(RuntimeError, match="synchronizing"):
        graph.record(work)
    assert (device.current, device.mode, device.renewed) == ("main", 0, [])
    assert [event for event, _ in device.events] == ["side waits for", "main waits for"] * 2, "also after the error"


def test_a_capture_that_fails_leaves_stream_and_generator_usable(device):
    def work():
        if device.capturing:
            raise RuntimeError("not permitted")
        return ()

    with pytest.raises(RuntimeError, match="capture_end") as caught:
        CudaGraph().record(work)
    assert str(caught.value.__context__) == "not permitted"
    assert (device.current, device.mode, device.renewed) == ("main", 0, ["state before"])


def test_a_capture_that_succeeds(device):
    seen = []

    def work():
        seen.append((device.capturing, device.mode))
        return (1,)

    assert CudaGraph().record(work) == (1,)
    assert seen == [(False, "error"), (True, 0)]
    assert (device.current, device.mode, device.renewed) == ("main", 0, [])
