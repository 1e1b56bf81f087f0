"""The benchmark of the training loop: fair turns, a twin that trains as ours, counted operations, tables, the page."""

from __future__ import annotations

import json
import math
import runpy
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from support_benchmarks import RESULTS, ROOT, run


@pytest.fixture
def benchmarks(monkeypatch):
    """Scripts import their neighbours, as they do when Python runs them by path."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def speeds(**changes) -> dict:
    """A record of the training loops: the twin takes 3 times as long in every round but one."""
    return {
        "benchmark": "training",
        "method": "manifold_mixup",
        "layers": ["input", "stage1"],
        "alpha": 2.0,
        "compiled": False,
        "network": "preact_resnet18",
        "width": 1.0,
        "parameters": 11_000_000,
        "device": "cpu",
        "batch": [100, 3, 32, 32],
        "images": 50_000,
        "data": "random bytes",
        "padding": 4,
        "workers": 2,
        "lead": 1,
        "steps": 10,
        "precisions": {"ours": "bf16", "authors' style": "fp32"},
        "seconds": {"ours": [0.5] * 7, "authors' style": [1.5] * 6 + [15.0]},
        "flops_per_image": 3_000_000_000,
        "peaks": {"bf16": 2e12, "fp32": 4e11},
        "quick": False,
        "machine": {"cpu": "CPU", "cores": 2, "threads": 2, "capability": "AVX512", "gpu": None, "load": 0.1},
        "versions": {"torch": "2.13.0"},
        "command": "python benchmarks/training.py",
        "date": "2026-01-01T00:00:00+00:00",
        **changes,
    }


def some_photos(rows: int = 24):
    """Images and labels, and how they are varied."""
    from manifold_mixup.lab.data import Examples, Pixels

    x = torch.randint(256, (rows, 3, 8, 6), dtype=torch.uint8)
    pixels = Pixels((0.2, 0.4, 0.5), (0.3, 0.2, 0.25), crop_padding=2, flip=True)
    return Examples(x, torch.arange(rows) % 4), pixels


def small_network():
    from manifold_mixup.lab.models import build_model

    return build_model("preact_resnet18", {"width": 1 / 16}, (3, 8, 8), 4)


def test_training(tmp_path):
    output, entries = run("training.py", tmp_path, "--json", "--method", "manifold_mixup", "none")
    shown = [json.loads(line) for line in output.splitlines()]  # nothing but JSON on stdout
    assert [entry["method"] for entry in entries] == ["manifold_mixup", "none"]
    assert [entry["layers"] for entry in entries] == [["input", "stage1", "stage2"], []]
    for entry, line in zip(entries, shown, strict=True):
        assert entry == {key: line[key] for key in entry}
        assert all(len(times) == 2 and min(times) > 0 for times in entry["seconds"].values())
        assert entry["machine"]["threads"] == 1
        assert entry["command"].startswith("python benchmarks/training.py")
        assert min(entry["peaks"].values()) > 0
        assert line["images_per_second"]["ours"] == pytest.approx(
            entry["batch"][0] / np.median(entry["seconds"]["ours"])
        )


def test_training_prints_its_table(benchmarks, monkeypatch, capsys, tmp_path):
    import rates
    import training

    path = tmp_path / "records.jsonl"
    options = ("--quick", "--workers", "0", "--rounds", "1", "--threads", "1", "--record", str(path))
    monkeypatch.setattr(sys, "argv", ["benchmarks/training.py", *options])
    missed = training.main()
    (entry,) = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    output = capsys.readouterr().out
    assert rates.table(entry) in output
    assert rates.verdicts(entry)[0] in output
    assert missed == ("MISSED" in output)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_training_compiles_nothing_while_the_clock_runs(tmp_path):
    _, (plain, compiled) = run("training.py", tmp_path, "--compile")
    assert (plain["compiled"], compiled["compiled"]) == (False, True)


@pytest.mark.parametrize("lead", [0, 1, 2])
def test_turns_time_only_what_is_theirs(benchmarks, monkeypatch, lead):
    import training

    now, said = 0.0, []

    def twin(off: int, on: int) -> float:
        nonlocal now
        said.append((off, on))
        now += 1000.0
        return float(len(said))

    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: now))
    turns = training.Turns(twin, rounds=3, warm_up=2, lead=lead, steps=4, warm=lambda: said.append("warm"))
    turns.progress(0)
    for step in range(1, turns.total + 1):
        place = (step - 3) % (lead + 4)  # of the step in our turn
        now += 50.0 if step < 3 or place < lead else 1.0 + (step - 3) // (lead + 4)
        turns.progress(step)
    assert said == [(0, lead + 1), "warm", (lead, 4), (lead, 4), (lead, 4)]
    assert turns.times == {"ours": [1.0, 2.0, 3.0], "authors' style": [3.0, 4.0, 5.0]}
    assert turns.order == []


def test_turns_alternate_which_comes_first(benchmarks):
    import training

    calls = []
    turns = training.Turns(
        lambda off, on: float(calls.append("twin") is None), rounds=4, warm_up=1, lead=0, steps=1, wait=lambda: None
    )
    for step in range(turns.total):
        turns.progress(step)
        calls.append("ours")
    turns.progress(turns.total)
    # before the turns a step of our warm-up and a turn of the twin's; after them one step more
    assert calls[:2] == ["ours", "twin"]
    assert calls[2:] == ["twin", "ours", "ours", "twin", "twin", "ours", "ours", "twin", "ours"]


def test_the_twins_workers_load_what_a_turn_needs_and_then_rest(benchmarks):
    from authors_style import AHEAD, Photos, Twin

    loaded = torch.zeros(1, dtype=torch.int64).share_memory_()

    class Counted(Photos):
        def __getitem__(self, index):
            loaded.add_(1)
            return super().__getitem__(index)

    examples, pixels = some_photos()
    sizes = {"classes": 4, "batch": 4, "steps": 3, "workers": 1, "alpha": 2.0, "lr": 0.01, "seed": 0}
    twin = Twin(small_network(), examples, pixels, device=torch.device("cpu"), photos=Counted, **sizes)
    for turn in (1, 2):
        assert twin.turn(lead=1, steps=2) > 0
        assert loaded.item() == turn * (3 + AHEAD) * 4
        time.sleep(0.05)
        assert loaded.item() == turn * (3 + AHEAD) * 4
    assert twin.losses.count == twin.top1.count == 2 * 3 * 4
    assert 0 < twin.losses.mean < 2
    assert twin.top1.mean <= twin.top5.mean
    twin.close()


def test_the_twin_mixes_and_learns_as_ours(benchmarks):
    """The same loss and the same gradients where both are given the same draw, at every layer of S."""
    from authors_style import MixingForward

    from manifold_mixup import ManifoldMixup
    from manifold_mixup.lab.criterion import bce_softmax

    torch.manual_seed(0)
    ours, theirs = small_network().double(), small_network().double()
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1])
    twin = MixingForward(theirs, 2.0, seed=0)
    for depth, layer in enumerate(["input", "stage1", "stage2"]):
        mixup = ManifoldMixup(ours, 2.0, [layer], seed=3)
        mixed_x, target = mixup(x, y)
        draw = (depth, mixup.last.lam, mixup.last.partner.numpy())
        twin.draw = lambda rows, draw=draw: draw
        loss = bce_softmax(ours(mixed_x), target)
        logits, soft = twin(x, F.one_hot(y, 4).double(), mix=True)
        same = torch.nn.BCELoss()(logits.softmax(1), soft)
        mixup.remove()
        torch.testing.assert_close(loss, same)
        for model, value in ((ours, loss), (theirs, same)):
            model.zero_grad()
            value.backward()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_the_twin_draws_all_of_s_and_permutations(benchmarks):
    from authors_style import MixingForward

    draws = [MixingForward(small_network(), 2.0, seed=seed).draw(6) for seed in range(40)]
    assert {layer for layer, _, _ in draws} == {0, 1, 2}
    assert all(0 < lam < 1 and sorted(partner) == list(range(6)) for _, lam, partner in draws)
    x, target = torch.randn(3, 3, 8, 8), torch.eye(4)[:3]
    net = MixingForward(small_network(), 2.0, seed=0)
    logits, same = net(x, target, mix=False)
    assert torch.equal(logits, net.network(x))
    assert same is target


def test_the_twin_varies_images_as_ours(benchmarks):
    """Its functions, image by image, against the lab's batch operation, at the same offsets and flips."""
    from authors_style import cropped, flipped, normalised

    from manifold_mixup.lab.augmentation import Augmentation

    examples, pixels = some_photos()
    ours = Augmentation(pixels, examples.x, seed=0)
    draws = ours.draw(len(examples))
    expected = ours.batch(torch.arange(len(examples)), draws)
    assert len(set(draws[2].tolist())) == 2
    for image, (down, right, flip), wanted in zip(examples.x, draws.t().tolist(), expected, strict=True):
        photo = flipped(Image.fromarray(image.permute(1, 2, 0).numpy()), bool(flip))
        right = -right if flip else right  # it flips before it crops, ours afterwards
        x = normalised(cropped(photo, 2, 2 + down, 2 + right), pixels.mean, pixels.sd)
        assert x.is_contiguous()
        torch.testing.assert_close(x, wanted.contiguous())


def test_the_twins_photos_come_in_all_places(benchmarks):
    from authors_style import Photos

    from manifold_mixup.lab.data import Examples

    examples, pixels = some_photos(1)
    photos = Photos(Examples(examples.x, torch.tensor([7])), pixels)
    seen = {photos[0][0].numpy().tobytes() for _ in range(600)}
    assert len(seen) == 2 * 5 * 5  # flipped or not, five offsets down and five to the right
    assert photos[0][1] == 7


def test_operations_are_counted_forward_and_backward(benchmarks):
    """Against the sizes of the layers: backward takes twice forward, but for the input nobody asks a gradient of."""
    import training

    from manifold_mixup.lab.models import build_model

    model = build_model("preact_resnet18", {"width": 1 / 16}, training.SHAPE, training.CLASSES)
    forward = {}

    def measure(module, args, output):
        forward[module] = 2 * output[0].numel() * math.prod(module.weight.shape[1:])

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(measure)
    model(torch.randn(2, *training.SHAPE))
    expected = 3 * sum(forward.values()) - forward[model.stem]
    assert training.flops_per_image(model, 2) == expected


def test_training_tables_show_the_rates(benchmarks):
    import rates

    entry = speeds()
    ours, twin = rates.table(entry).splitlines()[2:]
    assert ours == "| ours | bf16 | 500.0 | 200.0 | 3.00 [3.00, 3.00] | 3.00 to 30.00 | 0.600 | 30.0% |  |"
    assert twin == "| authors' style | fp32 | 1500.0 | 66.7 | 1 |  | 0.200 | 10.0% | 50.0% |"
    assert rates.summary(entry)["speed_up"]["interval"] == (3.0, 30.0)
    (text,) = rates.verdicts(entry)
    assert text.startswith("met: manifold_mixup, cpu: preact_resnet18, batch 100x3x32x32: 3.00 times as fast")
    for changes in ({"device": "cuda"}, {"seconds": {"ours": [1.0, 1.0], "authors' style": [2.4, 2.4]}}):
        assert rates.verdicts(speeds(**changes))[0].startswith("MISSED")


def test_the_page_of_training_shows_the_last_record_of_each_cell():
    training_speed = runpy.run_path(str(RESULTS / "training_speed.py"))
    old, new, quick = speeds(command="old"), speeds(command="new"), speeds(command="quick", quick=True)
    plain = speeds(method="none", layers=[], alpha=None)
    page = training_speed["page"]([old, plain, new, quick])
    assert "`new`" in page
    assert "`old`" not in page
    assert "`quick`" not in page
    assert page.count("* met: ") == 2
    assert page.index("## manifold_mixup, cpu") < page.index("## none, cpu")
    assert training_speed["NOTHING"] not in page


def test_the_page_of_training_is_made_from_the_records():
    training_speed = runpy.run_path(str(RESULTS / "training_speed.py"))
    records = training_speed["records"]()
    assert (RESULTS / "training_speed.md").read_text(encoding="utf-8") == training_speed["page"](records)
    assert all(entry["machine"]["cpu"] and entry["versions"]["torch"] and entry["date"] for entry in records)
