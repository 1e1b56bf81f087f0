"""The benchmarks run, their tables hold what they promise, and the page of results is made from the records."""

from __future__ import annotations

import json
import math
import runpy

import pytest
import torch

from support_benchmarks import RESULTS, ROOT, run


@pytest.fixture
def benchmarks(monkeypatch):
    """Scripts import their neighbours, as they do when Python runs them by path."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def record(**changes) -> dict:
    """A record as the scripts write it: ours costs 10 % more than plain in every round, naive 30 %."""
    base = [1.0, 2.0, 4.0, 8.0, 1.0, 2.0, 4.0]
    factors = {"plain": 1.0, "plain, second copy": 1.0, "ours": 1.1, "naive": 1.3}
    return {
        "benchmark": "step_overhead",
        "network": "vit_tiny",
        "mode": "eager-bf16",
        "device": "cpu",
        "batch": [32, 3, 96, 96],
        "layers": ["input", "blocks.2"],
        "seconds": {name: [factor * t for t in base] for name, factor in factors.items()},
        "peaks": {
            "plain": {"": 10_000_000},
            "ours": {"blocks.2": 11_000_000, "input": 12_100_000},
            "naive": {"input": 12_000_000, "blocks.2": 13_000_000},
        },
        "activations": {"input": 2_000_000, "blocks.2": 1_000_000},
        "quick": False,
        "machine": {"cpu": "CPU", "cores": 2, "threads": 2, "capability": "AVX512", "gpu": None, "load": 0.1},
        "versions": {"torch": "2.13.0"},
        "command": "python benchmarks/step_overhead.py",
        "date": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def check(entry: dict, output: str, variants: list[str]) -> None:
    ratios = runpy.run_path(str(ROOT / "benchmarks" / "ratios.py"))
    assert list(entry["seconds"]) == variants
    assert all(len(times) == 2 and min(times) > 0 for times in entry["seconds"].values())
    assert all(math.isfinite(ratio.median) and ratio.median > 0 for ratio in ratios["ratios"](entry).values())
    assert set(entry["peaks"]) == set(variants) - {"plain, second copy"}
    assert set(entry["peaks"]["ours"]) == set(entry["layers"]) == set(entry["activations"])
    head, _, *lines = ratios["table"](entry).splitlines()
    assert head == "| variant | ms | time / plain | 95 % interval | extra peak MB | extra / activation |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == variants
    assert ratios["table"](entry) in output
    assert all(verdict in output for verdict in ratios["verdicts"](entry))
    assert entry["machine"]["cpu"]
    assert entry["machine"]["threads"] == 1
    assert entry["versions"]["torch"] == torch.__version__
    assert entry["command"].startswith("python benchmarks/")


def test_step_overhead(tmp_path):
    options = ("--networks", "preact_resnet18", "bert_tiny_mask", "--modes", "eager-bf16")
    output, (images, text) = run("step_overhead.py", tmp_path, *options)
    assert images["layers"] == ["input", "layer1", "layer2"]
    for entry in (images, text):
        single = [f"{way}, {layer}" for layer in entry["layers"] for way in ("ours", "naive")]
        check(entry, output, ["plain", "plain, second copy", "ours", "ours, halves", "naive", *single])


def test_peers(tmp_path):
    output, (entry,) = run("peers.py", tmp_path, "--networks", "preact_resnet18", "--modes", "eager-fp32")
    check(entry, output, ["plain", "plain, second copy", "ours", "ours, input", "timm", "torchvision", "kornia"])


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet50", "vit_tiny", "bert_tiny"])
def test_step_overhead_of_the_other_networks(tmp_path, network):
    output, (entry,) = run("step_overhead.py", tmp_path, "--networks", network, "--modes", "eager-fp32")
    check(entry, output, ["plain", "plain, second copy", "ours", "ours, halves", "naive"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_is_compiled_while_the_clock_runs(tmp_path):
    output, (entry,) = run("step_overhead.py", tmp_path, "--networks", "bert_tiny", "--modes", "compile-bf16")
    check(entry, output, ["plain", "plain, second copy", "ours", "ours, halves", "naive"])


def test_steps_on_a_graph(benchmarks, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["graphs.py", "--quick", "--rounds", "2", "--json"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "benchmarks" / "graphs.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    kinds = ["plain", "naive, dense features", "GraphMix, on the graph", "GraphMix, of the twin", "evaluation"]
    assert list(found["seconds"]) == [*kinds, "GraphMix"]
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    one, other, both = (
        found["seconds"][kind] for kind in ("GraphMix, on the graph", "GraphMix, of the twin", "GraphMix")
    )
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(one, other, strict=True)])


def test_naive_is_the_same_training_as_ours(benchmarks):
    """Both ways take the same gradients where they are given the same draw."""
    import harness
    import step_overhead
    from workloads import NETWORKS

    case = harness.Case(NETWORKS["preact_resnet18"], "eager-fp32", torch.device("cpu"), quick=True)
    case.model, case.x = case.model.double(), case.x.double()
    for layer in ("input", "layer1", "layer2"):
        ours, mixup = step_overhead.ours(case, "ours", [layer])
        naive = step_overhead.Naive(case, [layer])
        x, mixed = ours.prepare(case.x, case.y)
        naive.prepare(case.x, case.y)
        naive.lam, naive.perm = mixup.last.lam, mixup.last.partner
        loss = ours.criterion(ours.model(x), mixed)
        same = naive.criterion(naive.model(case.x), (case.y, case.y[naive.perm]))
        torch.testing.assert_close(loss, same)
        loss.backward()
        same.backward()
        for a, b in zip(ours.model.parameters(), naive.model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_naive_follows_the_layers_that_ours_will_draw(benchmarks):
    import harness
    import step_overhead
    from workloads import NETWORKS

    case = harness.Case(NETWORKS["preact_resnet18"], "eager-fp32", torch.device("cpu"), quick=True)
    over_s, mixup = step_overhead.ours(case, "ours")
    naive = step_overhead.naive(case, "naive", over_s.layers, follows=mixup)
    naive.before_rounds(8)
    drawn = []
    for _ in range(8):
        for variant in (over_s, naive):
            variant.prepare(case.x, case.y)
        drawn.append((over_s.drawn(), naive.drawn()))
    assert all(one == other for one, other in drawn)
    assert len(set(drawn)) > 1


def test_peak_memory_counts_what_is_alive_at_once(benchmarks):
    import harness

    def operation() -> None:
        first = torch.ones(1000)  # 4000 bytes
        second = first + 1  # with the first one 8000
        del first
        del second
        torch.ones(500)

    assert 8000 <= harness.peak_bytes(operation) < 8100


def test_ratios_are_paired_by_round(benchmarks):
    import ratios

    found = ratios.ratios(record())
    assert found["ours"].median == pytest.approx(1.1)
    assert found["ours"].quartiles == pytest.approx((1.1, 1.1))
    assert found["naive"].interval == pytest.approx((1.3, 1.3))
    assert ratios.paired_ratio([1.0, 3.0], [1.0, 1.0]).interval is None
    # Order statistics: of 9 values the second and the eighth hold the median with 96 %.
    assert ratios.paired_ratio([float(k) for k in range(1, 10)], [1.0] * 9).interval == (2.0, 8.0)


def test_verdicts(benchmarks):
    import ratios

    text = [verdict.replace("step_overhead, vit_tiny, eager-bf16, cpu: ", "") for verdict in ratios.verdicts(record())]
    assert text == [
        "MISSED: ours / plain 1.100, at most 1.02",
        "met: ours / plain 1.100, below naive's 1.300",
        "MISSED: extra peak memory 1.05 activations of 'input', at most 1",
        "met: extra peak memory 1.00 activations of 'blocks.2', at most 1",
    ]
    assert len(ratios.verdicts(record(mode="eager-fp32"))) == 2  # time is aimed at in bf16


def test_the_page_shows_the_last_record_of_each_cell():
    overhead = runpy.run_path(str(RESULTS / "overhead.py"))
    old, new = record(command="old"), record(command="new")
    peers = record(benchmark="peers", mode="eager-fp32")
    page = overhead["page"]([old, peers, new, record(quick=True, command="quick")])
    assert "`new`" in page
    assert "`old`" not in page
    assert "`quick`" not in page
    assert "| ours | 2200.0 | 1.100 [1.100, 1.100] | 1.100 to 1.100 | 2.10 | 1.05 |" in page
    assert page.index("## Beside plain training") < page.index("## Beside other libraries")


@pytest.mark.skipif(not (RESULTS / "overhead.jsonl").exists(), reason="no run has been recorded yet")
def test_the_page_is_made_from_the_records():
    overhead, ratios = (runpy.run_path(str(p)) for p in (RESULTS / "overhead.py", ROOT / "benchmarks" / "ratios.py"))
    records = ratios["read"](RESULTS / "overhead.jsonl")
    assert (RESULTS / "overhead.md").read_text(encoding="utf-8") == overhead["page"](records)
    assert all(entry["machine"]["cpu"] and entry["versions"]["torch"] and entry["date"] for entry in records)
