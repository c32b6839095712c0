"""Compressors by themselves, and in DistributedOptimizer."""

import copy
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compressors import COMPRESSORS, Team, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from run_ranks import RankError, run_ranks
from torch import Tensor, nn

import pycomm
from pycomm.compression import BlockwiseInt8, Float16, TopK
from pycomm.errors import CommError, InvalidArgumentError, MismatchError, PeerLostError

every_compressor = pytest.mark.parametrize("name", COMPRESSORS)

floats = hypothesis_numpy.arrays(
    np.float32,
    st.integers(0, 600),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


# --- by themselves --------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(values=floats)
def test_float16_is_off_by_half_a_unit_in_the_last_place(values):
    result = Team(Float16(), 1).exchange([values])
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    too_large = np.isinf(expected)
    expected[too_large] = np.copysign(np.float32(65504), values[too_large])
    np.testing.assert_array_equal(result, expected)


@settings(deadline=None, max_examples=60)
@given(values=floats)
def test_int8_is_off_by_half_a_step_of_its_block_and_keeps_that(values):
    team = Team(BlockwiseInt8(), 1)
    result = team.exchange([values])
    for begin in range(0, len(values), 256):
        block = slice(begin, begin + 256)
        step = np.abs(values[block]).max(initial=0).astype(np.float64) / 127
        off = np.abs(result[block].astype(np.float64) - values[block])
        assert (off <= step * 0.5001 + 1e-43).all()
    np.testing.assert_allclose(
        result.astype(np.float64) + team.residual(0, len(values)), values, rtol=1e-6, atol=1e-43
    )


@settings(deadline=None, max_examples=60)
@given(values=floats, ratio=st.floats(1e-6, 1))
def test_top_k_sends_the_largest_of_each_block_and_keeps_the_rest(values, ratio):
    team, k = Team(TopK(ratio), 1), TopK(ratio).k
    result = team.exchange([values])
    residual = team.residual(0, len(values))
    np.testing.assert_array_equal(result + residual, values)
    for begin in range(0, len(values), 256):
        sent, kept = result[begin : begin + 256], residual[begin : begin + 256]
        assert np.count_nonzero(sent) <= k
        assert (sent * kept == 0).all()
        if np.count_nonzero(kept):
            assert np.abs(kept).max() <= np.abs(sent[sent != 0]).min()


@every_compressor
def test_ranks_get_the_mean_of_what_they_have_sent(name):
    gradients = [numbers(1000, seed) for seed in range(3)]
    team = Team(COMPRESSORS[name], 3)
    result = team.exchange(gradients)
    if name == "float16":
        sent = [values.astype(np.float16).astype(np.float32) for values in gradients]
    else:
        sent = [gradients[rank] - team.residual(rank, 1000) for rank in range(3)]
    np.testing.assert_allclose(result, np.mean(sent, axis=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int8", "top_k"])
def test_over_the_steps_nothing_is_lost(name):
    team = Team(COMPRESSORS[name], 2)
    given, received = np.zeros(700), np.zeros(700)
    for step in range(30):
        gradients = [numbers(700, 100 * step + rank) for rank in range(2)]
        given += np.mean(gradients, axis=0)
        received += team.exchange(gradients)
    rest = np.mean([team.residual(rank, 700) for rank in range(2)], axis=0)
    np.testing.assert_allclose(received + rest, given, rtol=1e-4, atol=1e-3)


@every_compressor
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_seen_by_all_and_leaves_nothing_behind(name, bad):
    team = Team(COMPRESSORS[name], 2)
    gradients = [numbers(600, 0), numbers(600, 1)]
    gradients[1][300] = bad
    assert not np.isfinite(team.exchange(gradients)[300])
    later = team.exchange([numbers(600, 2), numbers(600, 3)])
    assert np.isfinite(later).all()


def test_equal_magnitudes_go_in_their_order():
    values = np.ones(256, np.float32)
    values[1] = -1
    result = Team(TopK(3 / 256), 1).exchange([values])
    assert result[:4].tolist() == [1, -1, 1, 0] and not result[4:].any()


@pytest.mark.parametrize(("count", "name", "nbytes"), [
    (1024, "float16", 2048), (1024, "int8", 1040), (1024, "top_k", 4 * 13 * 5 + 12),
])  # fmt: skip
def test_payloads_are_as_short_as_documented(count, name, nbytes):
    bucket = Team(COMPRESSORS[name], 1).buckets[0]
    bucket.values = numbers(count, 0)
    assert COMPRESSORS[name].compress(bucket).nbytes == nbytes


@pytest.mark.parametrize("ratio", [0, -1, 1.5, "0.1", float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(InvalidArgumentError, match="TopK: ratio is"):
        TopK(ratio)


def test_simulated_cuda_kernels_give_the_bits_of_the_host():
    program = Path(__file__).with_name("compression_in_simulator.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=70)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["float16", "int8", "top_k"]


def test_without_numba_gradients_on_a_gpu_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)  # whose import then fails
    monkeypatch.delitem(sys.modules, "pycomm.compression.cuda", raising=False)
    team = Team(Float16(), 1, stream=0)
    with pytest.raises(CommError, match=r"pip install 'pycomm-torch\[compress\]'"):
        team.exchange([numbers(10, 0)])


# --- in DistributedOptimizer ----------------------------------------------------------------------


class Exact:
    """Sends everything: what a user might write."""

    def compress(self, bucket):
        return bucket.values.copy()

    def decompress(self, payloads, bucket):
        bucket.values[:] = payloads.sum(axis=0) / bucket.divisor


LAYERS = nn.ModuleList([nn.Linear(40, 30), nn.Linear(30, 20), nn.Linear(20, 10)])


def gradients_of(group, compressor, dtype=torch.float32, **options) -> list[Tensor]:
    """After three steps; a layer is used in the second alone, by rank 1 alone."""
    net = copy.deepcopy(LAYERS).to(dtype)
    optimizer = pycomm.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.01), net.named_parameters(), group=group,
        compressor=compressor, **options,
    )  # fmt: skip
    for step in range(3):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(10 * step + group.rank)
        x = torch.randn(8, 40, generator=generator).to(dtype)
        hidden = net[1](net[0](x).tanh())
        loss = hidden.square().mean() + (net[2](hidden).mean() if group.rank == 1 else 0)
        (loss if step == 1 else hidden.square().mean()).backward()
        optimizer.step()
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("hosts", [[0, 0], [0, 1]])
@pytest.mark.parametrize("options", [{}, {"op": pycomm.ReduceOp.SUM}, {"bucket_cap_bytes": 512}])
def test_a_compressor_that_loses_nothing_changes_nothing(options, hosts):
    plain = run_ranks(2, lambda group: gradients_of(group, None, **options), hosts=hosts)
    exact = run_ranks(2, lambda group: gradients_of(group, Exact(), **options), hosts=hosts)
    torch.testing.assert_close(exact, plain, rtol=1e-6, atol=1e-7)


def test_the_compressor_of_the_documentation_works():
    text = (Path(__file__).parent.parent / "docs" / "compression.md").read_text()
    names = {"np": np}
    exec(re.search(r"```python\n(class Signs:.*?)```", text, re.DOTALL)[1], names)
    team = Team(names["Signs"](), 2)
    np.testing.assert_allclose(
        team.exchange([np.float32([1, -2]), np.float32([3, 4])]), [2.5, 1.0], rtol=1e-6
    )
    np.testing.assert_allclose(  # -0.5 and -0.5, -0.5 and 0.5 were kept
        team.exchange([np.float32([0, 0]), np.float32([0, 0])]), [-0.5, 0.0], rtol=1e-6
    )


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_ranks_have_the_same_bits(name, dtype):
    gradients = run_ranks(
        3, lambda group: gradients_of(group, COMPRESSORS[name], dtype), hosts=[0, 0, 1]
    )
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=0)
    plain = run_ranks(3, lambda group: gradients_of(group, None, dtype), hosts=[0, 0, 1])
    assert [g is None for g in plain[0]] == [g is None for g in gradients[0]]


@every_compressor
def test_a_bucket_of_nothing_but_empty_parameters(name):
    def body(group):
        weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0, dtype=torch.bfloat16))]
        optimizer = pycomm.DistributedOptimizer(
            torch.optim.SGD(weights, lr=1), group=group, compressor=COMPRESSORS[name]
        )
        for _ in range(2):
            optimizer.zero_grad()
            (weights[0].sum() + weights[1].sum()).backward()
            optimizer.step()
        return weights[0].grad.tolist()

    gradients = run_ranks(2, body)
    assert gradients[0] == gradients[1]
    np.testing.assert_allclose(gradients[0], 1, rtol=1e-6)


def test_ctrl_c_in_a_compressor_is_heard_by_the_others():
    class Interrupted(Exact):
        def compress(self, bucket):
            if bucket.rank == 1:
                raise KeyboardInterrupt
            return super().compress(bucket)

    def body(group):
        kinds = KeyboardInterrupt if group.rank == 1 else PeerLostError
        with pytest.raises(kinds) as caught:
            linear_step(group, Interrupted())
        assert group.rank == 1 or "raised KeyboardInterrupt" in str(caught.value)

    run_ranks(2, body)


def test_accumulated_gradients_are_compressed_once():
    calls = []

    class Counting(Exact):
        def compress(self, bucket):
            calls.append(bucket.rank)
            return super().compress(bucket)

    def body(group):
        weight = nn.Parameter(torch.ones(5))
        optimizer = pycomm.DistributedOptimizer(
            torch.optim.SGD([weight], lr=1), group=group, compressor=Counting(),
            backward_passes_per_step=2, average_accumulated=True,
        )  # fmt: skip
        for _ in range(2):
            (weight * (1.0 + group.rank)).sum().backward()
        optimizer.step()
        return weight.grad.tolist()

    assert run_ranks(2, body) == [[1.5] * 5] * 2
    assert sorted(calls) == [0, 1]


def linear_step(group, compressor, steps=1):
    weight = nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([weight], lr=1)
    optimizer = pycomm.DistributedOptimizer(optimizer, group=group, compressor=compressor)
    for _ in range(steps):
        weight.sum().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["compress", "decompress"])
def test_what_a_compressor_raises_ends_the_group_and_says_why(method):
    class Broken(Exact):
        def __init__(self, rank):
            if rank == 1:
                setattr(self, method, self.fail)

        def fail(self, *_):
            raise ZeroDivisionError("of mine")

    errors = {}

    def body(group):
        with pytest.raises((ZeroDivisionError, PeerLostError)) as caught:
            linear_step(group, Broken(group.rank), steps=2)  # rank 1 may fail after it has sent
        errors[group.rank] = caught.value

    run_ranks(2, body)
    assert isinstance(errors[1], ZeroDivisionError)
    assert isinstance(errors[0], PeerLostError)
    assert f"Broken.{method}() of backward 1 of its step, bucket 0" in str(errors[0])
    assert "raised ZeroDivisionError: of mine" in str(errors[0])


@pytest.mark.parametrize(("payload", "message"), [
    ([1, 2], "returned a list, which is no NumPy array"),
    (np.zeros((2, 2)), r"array of shape \(2, 2\)"),
    (np.zeros(8)[::2], r"array of shape \(4,\) and strides \(2,\)"),
])  # fmt: skip
def test_a_payload_that_is_none_is_refused(payload, message):
    class Odd(Exact):
        def compress(self, bucket):
            return payload

    def body(group):
        # Both ranks are refused; the one that comes second may hear of the first instead.
        with pytest.raises((InvalidArgumentError, PeerLostError), match=message):
            linear_step(group, Odd())

    run_ranks(2, body)


def test_payloads_of_different_lengths_are_a_mismatch():
    class Uneven(Exact):
        def compress(self, bucket):
            return np.zeros(4 + bucket.rank, np.float32)

    with pytest.raises(RankError) as caught:
        run_ranks(2, lambda group: linear_step(group, Uneven()))
    assert isinstance(caught.value.__cause__, MismatchError)
    assert "all_gather 'test_compression" in str(caught.value)


def test_ranks_need_the_same_compressor():
    def body(group):
        with pytest.raises(MismatchError, match=r"TopK\(ratio=0.1\)(.|\n)*TopK\(ratio=0.2\)"):
            linear_step(group, TopK(0.1 if group.rank == 0 else 0.2))

    run_ranks(2, body)


@pytest.mark.parametrize(("options", "message"), [
    ({"compressor": Float16}, r"is the class Float16. Pass an object of it: Float16\(\)"),
    ({"compressor": "float16"}, r"'float16', which has no compress\(\)"),
    ({"compressor": Float16(), "precision": "exact_order"}, "Pass one of them"),
])  # fmt: skip
def test_what_is_no_compressor_is_refused(options, message):
    def body(group):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(5))], lr=1)
        with pytest.raises(InvalidArgumentError, match=message):
            pycomm.DistributedOptimizer(optimizer, group=group, **options)

    run_ranks(2, body)


def test_gradients_wider_than_a_compressor_sees_are_refused():
    def body(group):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(5, dtype=torch.float64))], lr=1)
        with pytest.raises(InvalidArgumentError, match=r"is torch\.float64, and gradients are"):
            pycomm.DistributedOptimizer(optimizer, group=group, compressor=Float16())

    run_ranks(2, body)


# --- the main job ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    folder = Path(__file__).parent.parent / "examples"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("train", folder / "train.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))


@pytest.mark.parametrize(
    ("compressor", "least"),
    [(None, 0.98), (Float16(), 0.98), (BlockwiseInt8(), 0.98), (TopK(0.1), 0.96)],
    ids=repr,
)
def test_the_main_job_converges(example, compressor, least):
    train_set, test_set = example.load_data()
    images, labels = train_set.tensors
    start = example.build_model()  # ranks are threads, and would share a generator

    def body(group):
        model = copy.deepcopy(start)
        optimizer = pycomm.DistributedOptimizer(
            example.build_optimizer(model), group=group, compressor=compressor
        )
        schedule = example.build_schedule(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            for batch in torch.randperm(len(images), generator=generator).split(64):
                mine = batch[group.rank :: group.size]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[mine]), labels[mine]).backward()
                optimizer.step()
            schedule.step()
        with torch.no_grad():
            right = model(test_set.tensors[0]).argmax(1) == test_set.tensors[1]
        return float(right.float().mean())

    accuracy, same = run_ranks(2, body)
    assert accuracy == same
    assert accuracy >= least
