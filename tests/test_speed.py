"""The benchmark of the speed: what it counts, what it refuses to say, what it writes. Nothing here depends on time."""

import io
import json
import statistics
from contextlib import redirect_stdout
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from attacks.clean_label import pgd_batch
from attacks.input_aware import InputAwareAllToAll
from benchmarks import loops, meter, same_place, speed, tables
from benchmarks.loops import STEPS, Loops, Setup
from data.datasets import DATASETS
from defenses import AnpConfig
from engine.evaluation import EVALUATION_BATCH, Evaluator
from engine.runtime import Runtime
from engine.training import TrainConfig
from utils.machine import Cpus

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
NETWORK = """from torch import nn

def build(num_classes):
    layers = [nn.Conv2d(3, 4, 3, stride=8, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, num_classes))
"""
RATIOS = {"plain_percent_of_peak", "fast_percent_of_peak", "speed_up"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A network of a few operations on the tiny dataset."""
    path = tmp_path_factory.mktemp("network") / "small.py"
    path.write_text(NETWORK)
    given = ["--dataset", "tiny", "--model", f"{path}:build", "--batch-size", "16", "--batches", "1", "--threads", "1"]
    return [*given, "--precision", "bf16", "--device", "cpu"]


@pytest.fixture(autouse=True)
def narrow_generators(monkeypatch):
    monkeypatch.setattr(loops, "InputAwareAllToAll", partial(InputAwareAllToAll, generator_width=1 / 16))


def peaks(monkeypatch, *gflops, used=0.0):
    """Let the peaks be these: fp32 and bf16 before, then after; and others use so many CPUs at the end."""
    values, loads = iter(gflops), iter((0.0, used))
    monkeypatch.setattr(speed, "find_cpus", lambda seconds: Cpus(2, busy=next(loads)))
    monkeypatch.setattr(speed, "peak_flops", lambda device, precision: 1e9 * next(values))
    return values


def make_setup(flags, *others):
    args = speed.parse_arguments([*flags, *others])
    return speed.make_setup(args, Runtime(CPU, torch.float32))


# Was the machine busy?


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ((100, 300), (100, 300), None),
        ((100, 300), (110, 273), None),
        ((100, 300), (111, 300), "fp32"),
        ((111, 300), (100, 300), "fp32"),
        ((100, 300), (100, 272), "bf16"),
        ((100, 300), (50, 600), "fp32 and bf16"),
    ],
)
def test_a_peak_that_changed_by_more_than_a_tenth(before, after, changed):
    peaks = [dict(zip(("fp32", "bf16"), each, strict=True)) for each in (before, after)]
    sign = f"its peak in {changed} changed by more than 10 %"
    assert meter.signs_of_others(*peaks, [0.2, None]) == ([sign] if changed else [])


@pytest.mark.parametrize(
    ("used", "signs"), [([0.1, 0.2], []), ([None, None], []), ([0.0, 1.06], ["others used 1.1 CPUs"])]
)
def test_a_load_that_stays_the_same_is_noticed(used, signs):
    assert meter.signs_of_others({"fp32": 100}, {"fp32": 100}, used) == signs


@pytest.fixture(scope="module")
def idle(flags, tmp_path_factory):
    """What a run on an idle machine printed and wrote."""
    path, out = tmp_path_factory.mktemp("idle") / "speed.json", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(loops, "InputAwareAllToAll", partial(InputAwareAllToAll, generator_width=1 / 16))
        peaks(patch, 0.02, 0.04, 0.021, 0.039)
        assert speed.main([*flags, "--rounds", "3", "--json", str(path), "--data-dir", "/somewhere"]) == 0
    return out.getvalue(), path


def test_everything_measured_is_written(idle):
    result = json.loads(idle[1].read_text())
    assert result["command"].startswith("python -m benchmarks.speed --dataset tiny --model small.py:build ")
    assert "/" not in result["command"] and result["model"] == "small.py:build"
    assert (result["threads"], result["precision"], result["device"], result["seed"]) == (1, "bf16", "cpu", 0)
    assert (result["batch_size"], result["batches"], result["rounds"]) == (16, 1, 3)
    assert result["versions"]["torch"] == torch.__version__ and result["hardware"]
    assert result["busy"] is False
    assert [row["step"] for row in result["rows"]] == list(STEPS)
    for row in result["rows"]:
        kinds = ["plain", "fast"] if row["step"].startswith("step") else ["fast"]
        assert [name for name in ("plain", "fast") if name in row] == kinds
        assert 0 <= row["not_conv_percent"] <= 100
        for name in kinds:
            assert len(row[f"{name}_rates"]) == 3 and min(row[f"{name}_rates"]) > 0
            assert row[name] == statistics.median(row[f"{name}_rates"])


def test_ratios_are_those_of_the_better_peak():
    row = {"plain": 50.0, "plain_gflops": 30.0, "fast": 120.0, "fast_gflops": 90.0}
    found = speed.ratios(row, {"fp32": 60.0, "bf16": 100.0}, "bf16")
    assert found == {"plain_percent_of_peak": 50, "fast_percent_of_peak": 90, "speed_up": 2.4}
    assert speed.ratios({"fast": 1.0, "fast_gflops": 30.0}, {"fp32": 60.0}, "fp32") == {"fast_percent_of_peak": 50}


def test_peaks_before_and_after_are_written_and_the_better_one_counts(monkeypatch, flags, tmp_path):
    peaks(monkeypatch, 100, 300, 109, 290)
    assert speed.main([*flags, "--steps", "step-3", "--json", str(tmp_path / "speed.json")]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["peaks_before"] == {"fp32": 100, "bf16": 300}
    assert result["peaks_after"] == {"fp32": 109, "bf16": 290}
    assert result["peaks_gflops"] == {"fp32": 109, "bf16": 300}


def test_ratios_are_printed_on_an_idle_machine(idle):
    (rates, ratios), result = idle[0].split("peak, one large"), json.loads(idle[1].read_text())
    for row in result["rows"]:
        cells = next(line.split() for line in rates.splitlines() if line.startswith(row["step"]))
        shown = f"{row['plain']:.1f}" if "plain" in row else "-"
        assert cells[1:] == [str(row["batch_size"]), shown, f"{row['fast']:.1f}", str(row["not_conv_percent"]), "%"]
        line = next(line for line in ratios.splitlines() if line.startswith(row["step"]))
        assert f"{row['fast_percent_of_peak']} %" in line
        assert "plain" not in row or line.endswith(f"{row['speed_up']:.2f}x")


def test_a_written_file_is_rendered(idle, tmp_path):
    (tmp_path / "speed.json").write_bytes(idle[1].read_bytes())
    results = tables.load_results(tmp_path)
    lines, rows = tables.speed_table(results).splitlines(), results[0]["rows"]
    assert lines[0] == "| | plain | of fp32 peak | this project | of bf16 peak | speed-up |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == [row["loop"] for row in rows]
    assert f"{rows[0]['fast']:.1f}" in lines[2] and f"{rows[0]['speed_up']:.2f}x" in lines[2]
    assert "step 3, prune" in tables.speed_runs_table(results)
    assert idle[1].read_text() == tables.result_text(json.loads(idle[1].read_text()))


def test_the_titles_are_those_of_the_results():
    known = json.loads((tables.ROOT / "results" / "speed.json").read_text())
    assert [row["loop"] for row in known["rows"]] == [title for title, _ in STEPS.values()]


@pytest.mark.parametrize(
    ("fp32", "used", "sign"),
    [(80, 0.0, "its peak in fp32 changed by more than 10 %"), (100, 0.7, "others used 0.7 CPUs")],
)
def test_a_busy_machine_gets_rates_and_no_ratios(fp32, used, sign, monkeypatch, capsys, flags, tmp_path):
    peaks(monkeypatch, 100, 300, fp32, 300, used=used)
    path = tmp_path / "speed.json"
    assert speed.main([*flags, "--steps", "step-2", "step-3", "--json", str(path)]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"speed: error: the machine was busy: {sign} meanwhile")
    assert f"100 and {fp32} GFLOP/s in fp32" in out and "speed-up" not in out and "of fp32 peak" not in out
    result = json.loads(path.read_text())
    assert result["busy"] is True and [row["step"] for row in result["rows"]] == ["step-2", "step-3"]
    for row in result["rows"]:
        assert not RATIOS & set(row) and f"{row['plain']:.1f}" in out and f"{row['fast']:.1f}" in out
    with pytest.raises(KeyError, match="percent_of_peak"):  # so benchmarks.tables refuses the file
        tables.speed_table(tables.load_results(tmp_path))


# What is counted


def test_flops_of_a_known_layer():
    setup = Setup(DATASETS["tiny"](None), nn.Conv2d(3, 8, 3, padding=1), None, None, 16, 1, 0)
    assert setup.flops == 2 * 3 * 3 * 3 * 8 * 32 * 32


def test_the_peak_counts_what_its_convolution_computes(monkeypatch):
    flops = []

    def seconds(work, device):
        with FlopCounterMode(display=False) as counter:
            work()
        flops.append(counter.get_total_flops())
        return 4.0 - len(flops) if len(flops) < 3 else 2.0  # 3, 2, 2...: the best one counts, not the last

    monkeypatch.setattr(meter, "seconds", seconds)
    monkeypatch.setitem(meter.IMAGES, "cpu", 2)
    assert meter.peak_flops(CPU, torch.float32, channels=4) == flops[0] / 2
    assert len(flops) == meter.STRETCHES > 1


def test_loops_take_turns_after_a_warm_up(monkeypatch):
    called = []
    times = iter([2.0, 1.0, 4.0, 2.0, 3.0, 0.5])

    def seconds(work, device):
        work()
        return next(times)

    monkeypatch.setattr(speed, "seconds", seconds)
    pair = Loops(lambda: called.append("plain"), lambda: called.append("fast"), 4, 12, 1e9, 3, 2)
    row = speed.time_loops(pair, 3, CPU)
    assert called == ["plain", "fast"] * 4
    assert row["plain_rates"] == [6, 3, 4] and row["fast_rates"] == [12, 6, 24]
    assert (row["plain"], row["fast"], row["plain_gflops"], row["fast_gflops"]) == (4, 12, 12, 24)


def test_a_stretch_is_as_many_batches_as_asked_for_and_goes_on_into_the_next_epoch(monkeypatch, flags):
    seen = []
    original = loops.SgdLoop.train_batch

    def train_batch(loop, index, epoch, batch):
        seen.append((epoch, batch, len(index)))
        return original(loop, index, epoch, batch)

    monkeypatch.setattr(loops.SgdLoop, "train_batch", train_batch)
    setup = make_setup(flags, "--batch-size", "200")._replace(batches=3)
    pair = loops.step_1(setup)
    pair.fast()
    assert seen == [(0, 0, 200), (0, 1, 200), (1, 0, 200)] and pair.images == 600
    trained = []
    monkeypatch.setattr(loops, "plain_train", lambda network, batches: trained.extend(len(b[1]) for b in batches))
    pair.plain()
    assert trained == [200, 200, 200]


@pytest.mark.parametrize(("name", "jointly"), [("iab-masks", False), ("iab-joint", True)])
def test_both_phases_of_the_input_aware_attack(monkeypatch, flags, name, jointly):
    phases = []
    base = loops.InputAwareAllToAll.func.make_loop

    def make_loop(*arguments):
        loop = base(*arguments)
        for step in ("_mask_step", "_joint_step"):
            original = getattr(loop, step)
            setattr(loop, step, lambda *a, step=step, original=original: phases.append(step) or original(*a))
        return loop

    monkeypatch.setattr(InputAwareAllToAll, "make_loop", make_loop)
    STEPS[name][1](make_setup(flags)._replace(batches=2)).fast()
    assert phases == [["_mask_step", "_joint_step"][jointly]] * 2


def test_batches_are_those_of_the_scripts(flags):
    assert speed.SpeedConfig.batch_size == TrainConfig.batch_size == AnpConfig.batch_size
    setup = make_setup(flags)
    evaluator = Evaluator(setup.dataset.test, None, setup.dataset.normalization, torch.float32)
    assert loops.step_3(setup).batch == evaluator.batch_size == EVALUATION_BATCH
    assert loops.clean_label(setup).batch == pgd_batch(setup.runtime.device)
    assert loops.step_1(setup).batch == loops.step_2(setup).batch == 16
    assert speed.BATCHES == {"cpu": 3, "cuda": 50}
    assert make_setup(["--dataset", "tiny", "--widen-factor", "0.0625"]).batches == 3


# The profiler


def test_profiled_time_adds_up():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    events = meter.profiled(lambda: network(torch.randn(4, 3, 8, 8)).sum().backward(), CPU)
    mixing, other = meter.split_time(events, CPU)
    assert mixing + other == pytest.approx(sum(event.self_cpu_time_total for event in events))
    names = {event.key: event.self_cpu_time_total for event in events}
    assert {"aten::addmm", "aten::convolution_backward", "aten::native_batch_norm"} <= set(names)
    assert mixing == pytest.approx(
        sum(t for key, t in names.items() if "conv" in key or key.endswith(("mm", "linear")))
    )
    assert mixing > names["aten::addmm"] + names["aten::convolution_backward"] > 0
    assert other > names["aten::native_batch_norm"] > 0


def test_without_a_convolution_nothing_is_one():
    events = meter.profiled(lambda: torch.ones(8).add(1).sum(), CPU)
    mixing, other = meter.split_time(events, CPU)
    assert mixing == 0 < other


@pytest.mark.parametrize(
    ("name", "mixing"),
    [
        ("aten::mkldnn_convolution", True),
        ("aten::convolution_backward", True),
        ("aten::_slow_conv2d_forward", True),
        ("aten::bmm", True),
        ("aten::addmm", True),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", True),
        ("ampere_scudnn_128x64_relu_medium_nn_v1", True),
        ("void cudnn::cnn::wgrad2d_grouped_direct_kernel<__nv_bfloat16>", True),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNT", True),
        ("aten::native_batch_norm_backward", False),
        ("aten::upsample_bilinear2d", False),
        ("aten::sum", False),
        ("aten::comm", False),
        ("void cudnn::ops::convertTensor_kernel<float>", False),
        ("void cudnn::bn_bw_1C11_kernel_new<__nv_bfloat16>", False),
        ("void at::native::vectorized_elementwise_kernel<4>", False),
        ("Memcpy HtoD (Pageable -> Device)", False),
    ],
)
def test_what_counts_as_convolution_or_product(name, mixing):
    event = SimpleNamespace(key=name, self_cpu_time_total=3.0)
    assert meter.split_time([event], CPU) == ((3.0, 0.0) if mixing else (0.0, 3.0))


def test_on_cuda_kernels_count_and_nothing_twice():
    def event(key, kind, device_time, annotation=False):
        return SimpleNamespace(
            key=key,
            device_type=kind,
            self_device_time_total=device_time,
            self_cpu_time_total=1000.0,
            is_user_annotation=annotation,
        )

    events = [
        event("aten::cudnn_convolution", DeviceType.CPU, 30.0),  # whose kernel comes below
        event("sm90_xmma_fprop_implicit_gemm", DeviceType.CUDA, 30.0),
        event("vectorized_elementwise_kernel", DeviceType.CUDA, 10.0),
        event("Optimizer.step#SGD.step", DeviceType.CUDA, 500.0, annotation=True),
    ]
    assert meter.split_time(events, CUDA) == (30.0, 10.0)


def test_on_cuda_time_is_taken_between_events(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("record")

        def elapsed_time(self, last):
            assert self is not last
            return 2500.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("synchronize"))
    assert meter.seconds(lambda: happened.append("work"), CUDA) == 2.5
    assert happened == ["synchronize", "record", "work", "record", "synchronize"]


def test_the_costliest_operators_of_one_step(monkeypatch, capsys, flags):
    peaks(monkeypatch, 100, 300, 100, 300)
    assert speed.main([*flags, "--profile", "step-2"]) == 0
    out = capsys.readouterr().out.splitlines()
    rules = [number for number, line in enumerate(out) if line.startswith("-----")]
    assert len(rules) == 3 and rules[2] - rules[1] == 11 and "Self CPU" in out[rules[0] + 1]
    assert sum(line.startswith("step-2") for line in out) == 2 and not any(line.startswith("step-1") for line in out)


def test_a_profiler_that_sees_nothing_is_no_fault(monkeypatch, capsys, flags):
    monkeypatch.setattr(speed, "split_time", lambda events, device: (0.0, 0.0))
    row = speed.measure("step-3", make_setup(flags), 1)
    assert "not_conv_percent" not in row and capsys.readouterr().out.split()[-1] == "-"


# Flags


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ([], list(STEPS)),
        (["--steps", "step-3", "step-1", "step-3"], ["step-1", "step-3"]),
        (["--profile", "step-2"], ["step-2"]),
        (["--steps", "step-1", "step-2", "--profile", "step-2"], ["step-1", "step-2"]),
    ],
)
def test_only_the_steps_asked_for(given, chosen):
    assert speed.from_flags(speed.SpeedConfig, speed.parse_arguments(given)).chosen == chosen


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--steps", "step-1", "--profile", "step-2"], "--profile step-2: --steps leaves this step out"),
        (["--steps", "step-4"], "invalid choice: 'step-4'"),
        (["--batches", "0"], "0 is out of range"),
        (["--model", "net.py:build", "--arch", "vgg19_bn"], "--model builds the network itself"),
    ],
)
def test_bad_flags(capsys, given, message):
    with pytest.raises(SystemExit) as end:
        speed.main(given)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and message in line


def test_the_split_file_decides_whose_images_these_are(monkeypatch, flags, tmp_path):
    path = tmp_path / "split.txt"
    path.write_text("\n".join(map(str, reversed(range(600)))))
    setup = make_setup(flags, "--split-file", str(path))
    train = setup.dataset.train
    assert torch.equal(setup.attacker().images, train.images[torch.arange(539, -1, -1)[:528]])  # 33 batches of 16
    seen = {}
    monkeypatch.setattr(loops, "optimize_masks", lambda noisy, images, *others: seen.update(images=images) or iter(()))
    loops.step_2(setup)
    assert torch.equal(seen["images"], train.images[torch.arange(599, 593, -1)])


def test_the_seed_decides_weights_and_batches(monkeypatch, flags):
    one, same, other = (make_setup(flags, "--seed", seed) for seed in ("1", "1", "2"))
    weights = [setup.network[0].weight for setup in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    seeds = []
    monkeypatch.setattr(
        loops, "optimize_masks", lambda n, i, la, runs, t: seeds.extend(r.seed for r in runs) or iter(())
    )
    monkeypatch.setattr(
        loops, "SgdLoop", lambda n, tr, no, f, config: SimpleNamespace(steps=lambda: seeds.append(config.seed))
    )
    for step in (loops.step_1, loops.step_2):
        step(other)
    assert seeds == [2, 2]
    several = loops.step_2(make_setup(flags, "--seed", "2", "--mask-seeds", "3"))
    assert seeds[2:] == [2, 3, 4] and several.images == 3 * loops.step_2(other).images


def test_every_step_starts_with_the_same_network(monkeypatch, flags):
    setup = make_setup(flags)
    before = setup.network[0].weight.clone()
    speed.measure("step-1", setup, 1)
    assert torch.equal(setup.network[0].weight, before)


# What goes wrong


def bad_split(folder):
    (folder / "split.txt").write_text("1 2 3")
    return ["--split-file", str(folder / "split.txt")], "3 entries, but the dataset has 600 training images"


def output_is_there(folder):
    (folder / "out.json").write_text("mine")
    return ["--json", str(folder / "out.json")], "is there already"


def no_folder(folder):
    return ["--json", str(folder / "nowhere" / "out.json")], "there is no folder"


def a_batch_too_large(folder):
    return ["--batch-size", "541", "--steps", "step-1"], "step 1 has only 540 images"


@pytest.mark.parametrize("prepare", [bad_split, output_is_there, no_folder, a_batch_too_large])
def test_bad_input_ends_in_one_line(monkeypatch, capsys, flags, tmp_path, prepare):
    peaks(monkeypatch, 100, 300)
    given, message = prepare(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert speed.main([*flags, *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("speed: error: ") and message in line
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_an_output_that_is_refused_costs_no_time(monkeypatch, flags, tmp_path):
    left = peaks(monkeypatch, 100)
    given, _ = no_folder(tmp_path)
    assert speed.main([*flags, *given]) == 1 and next(left) == 100


def test_same_place_ends_in_one_line(capsys, tmp_path):
    assert same_place.main(["--checkpoint", str(tmp_path / "none.th")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("same_place: error: ") and "none.th" in line


@pytest.mark.slow
def test_same_place_compares_the_fast_loop_with_the_plain_one(trained, capsys):
    source = ["--checkpoint", f"{trained}/last_model.th", "--trigger-info", f"{trained}/trigger_info.th"]
    options = ["--nb-iter", "1", "--val-frac", "0.1", "--batch-size", "16", "--precision", "fp32", "--threads", "1"]
    assert same_place.main([*source, *options]) == 0
    first = capsys.readouterr().out.split("against the plain loop")[1].splitlines()
    assert first[1].startswith("masks: correlation 1.0000, mean difference 0.0000")
    assert [line for line in first if line.startswith("largest")] == [
        "largest difference in C-Acc: 0.00 points",
        "largest difference in ASR: 0.00 points",
    ]


def test_the_name_of_the_processor(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Fast One\nmodel name\t: Another\n")
    assert speed.processor(CPU, info) == "A Fast One"
    assert speed.processor(CPU, tmp_path / "none")
