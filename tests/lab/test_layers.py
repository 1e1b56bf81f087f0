import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from manifold_mixup import cut_points
from manifold_mixup.lab import cli, display
from support_docs import ROOT, blocks

PROCESS = Path(__file__).parents[1] / "cli_process.py"
GUIDE = ROOT / "docs" / "guides" / "networks.md"
RESNET = ("timm:resnet18", "--input", "3,32,32")
NET = """
import torch
from torch import nn

class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.branch, self.last = nn.Linear(6, 60), nn.Linear(60, 60), nn.Linear(60, 2)
    def forward(self, x):
        print("a network that talks")
        h = self.first(x)
        return self.last(h + self.branch(h))
"""


@pytest.fixture
def net(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture
def call(capsys):
    """Call the command in this process: exit code, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(["layers", *map(str, arguments)])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return run


def process(*arguments):
    return subprocess.run(
        [sys.executable, str(PROCESS), "layers", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def rows(out):
    """The cells of each line of the table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def assert_refused(result, pattern):
    code, out, err = result
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: .*{pattern}.*\n", err), err


def resnet():
    timm = pytest.importorskip("timm")
    return timm.create_model("resnet18")


# ------------------------------------------------------------------ what it prints


def test_the_table_holds_every_cut_point_as_cut_points_finds_them(call):
    points = cut_points(resnet(), torch.randn(2, 3, 32, 32))
    code, out, err = call(*RESNET)
    assert (code, err) == (0, "")
    expected = [
        [
            "●" if p.name in ("input", "layer1", "layer2") else "",
            p.name,
            "\N{MULTIPLICATION SIGN}".join(map(str, p.shape)),
            f"{p.features:,}",
            f"{p.compute:.1%}",
            f"{p.own_compute:.1%}",
            "●" if p.stage_end else "",
        ]
        for p in points
    ]
    assert rows(out) == expected
    assert len(expected) > 20
    assert sum(bool(row[-1]) for row in expected) >= 4
    assert 'layers=["input", "layer1", "layer2"], which is what layers=\'auto\' takes' in out
    assert "examples: (3, 32, 32)" in out


def test_json_is_one_object_per_cut_point_and_nothing_else(call, net):
    points = cut_points(resnet(), torch.randn(2, 3, 32, 32))
    code, out, err = call(*RESNET, "--json")
    assert (code, err) == (0, "")
    found = [json.loads(line) for line in out.splitlines()]
    keys = ("name", "features", "compute", "own_compute", "stage_end")
    assert [[entry[key] for key in keys] for entry in found] == [[getattr(p, key) for key in keys] for p in points]
    assert [tuple(entry["shape"]) for entry in found] == [p.shape for p in points]
    assert [entry["name"] for entry in found if entry["chosen"]] == ["input", "layer1", "layer2"]
    code, out, err = call(f"{net}:Skip", "--input", "6", "--json", "--all")
    found = {entry["name"]: entry for entry in map(json.loads, out.splitlines())}
    assert "talks" in err
    assert list(found) == ["input", "first", "last", "branch"]
    assert found["branch"]["cut_point"] is False
    assert found["branch"]["bypass"] == "first"
    assert "'first'" in found["branch"]["reason"]


def test_ones_own_layers_are_marked(call):
    pytest.importorskip("timm")
    code, out, _ = call(*RESNET, "-l", "layer3", "--layer", "input")
    assert code == 0
    assert [row[1] for row in rows(out) if row[0]] == ["input", "layer3"]
    assert 'layers=["layer3", "input"]\n' in out


def test_all_lists_the_other_calls_with_what_goes_past_them(call, net):
    code, out, _ = call(f"{net}:Skip", "--input", "6", "--all")
    assert code == 0
    assert [row[1] for row in rows(out)[:3]] == ["input", "first", "last"]
    assert re.search(r"│ branch +│ what 'first' computes reaches the model's own forward \(add\)", out)


def test_the_kind_of_numbers_can_be_given_for_all_inputs(call, tmp_path):
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\nnet = nn.Sequential(nn.Embedding(2, 4), nn.Linear(4, 2))")
    _, out, _ = call(f"{path}:net", "--input", 7, "--dtype", "int")
    assert "examples: (7,) of integers" in out
    assert [row[1:3] for row in rows(out)] == [["0", "7\N{MULTIPLICATION SIGN}4"], ["1", "7\N{MULTIPLICATION SIGN}2"]]


def test_on_meta_a_network_that_no_machine_holds_can_be_looked_at(call):
    code, out, _ = call("mlp:width=1000000,depth=3", "--input", 1000, "--meta")
    assert code == 0
    assert ["hidden.2.linear", "1000000"] in [row[1:3] for row in rows(out)]
    assert_refused(call("mlp:width=1000000,depth=3", "--input", 1000), "2001.0 billion parameters.*--meta")


def test_what_goes_past_a_long_stretch_is_said_below_the_table(call, net):
    _, out, _ = call(f"{net}:Skip", "--input", "6")
    assert "Between 'first' (9% of the compute) and 'last' (100% of the compute) none of 1 module calls" in out
    assert "\n  branch: what 'first' computes reaches the model's own forward (add)" in out


def test_masks_that_are_united_have_a_column(call):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    ids, mask = torch.randint(5, 90, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    points = cut_points(model, input_ids=ids, attention_mask=mask)
    options = ",".join(f"{key}={value}" for key, value in sizes.items())
    code, out, err = call(f"hf:BertForSequenceClassification:{options}", "--input", 8)
    assert (code, err) == (0, "")
    assert [(row[1], bool(row[-1])) for row in rows(out)] == [(p.name, p.masks) for p in points]
    assert {p.masks for p in points} == {True, False}
    assert "Masks: mixing here unites" in " ".join(out.split())
    assert "examples: input_ids=(8,) of integers, attention_mask=(8,) of integers" in out


def test_shapes_of_several_tensors_are_joined():
    assert display.shape_text(((401, 96), (197, 192))) == "401×96 + 197×192"  # noqa: RUF001
    assert display.shape_text((7,)) == "7"
    assert display.shape_text(()) == "1"


def test_brackets_in_names_are_no_markup(call, tmp_path):
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\nnet = nn.Sequential()\nnet.add_module('[bold]', nn.Linear(4, 2))\n")
    _, out, _ = call(f"{path}:net", "--input", 4)
    assert [row[1] for row in rows(out)] == ["input", "[bold]"]


def test_help_has_examples_and_says_that_nothing_is_downloaded(call):
    code, out, _ = call("--help")
    assert code == 0
    assert out.count("manifold-mixup layers ") >= 4
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", out).split())
    assert "none are downloaded, ever" in words


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_there_is_a_spinner_on_a_terminal_unless_quiet(monkeypatch, terminal, quiet):
    target = Console(file=io.StringIO(), force_terminal=terminal)
    monkeypatch.setattr(display, "console", lambda stderr: target if stderr else None)
    with display.working("building [net]", quiet=quiet):
        pass
    assert ("building [net]" in target.file.getvalue()) == (terminal and not quiet)


# ------------------------------------------------------------------ what it refuses

BAD = {
    "a layer in a branch": ((*RESNET, "-l", "layer1.0.conv2"), r"'layer1\.0\.conv2' is not a cut point.*'maxpool'"),
    "a layer that is not there": ((*RESNET, "-l", "layer11"), "no module named 'layer11'. Did you mean .*'layer1'"),
    "a network that is not there": (("timm:resnet5O",), "'resnet5O': did you mean 'resnet50'"),
    "a shape that does not fit": (
        ("timm:vit_tiny_patch16_224:depth=1", "--input", "3,32,32"),
        r"\(32\) doesn't match model \(224\); it was given \(3, 32, 32\): say what it reads with --input",
    ),
    "no shape": (("timm:resnet18", "--input", "large"), "--input 'large' should read"),
    "a file that is not there": (("nowhere/net.py:net",), "cannot read nowhere/net.py: No such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line(call, case):
    arguments, pattern = BAD[case]
    if "timm" in arguments[0]:
        pytest.importorskip("timm")
    assert_refused(call(*arguments), pattern)


def test_a_missing_package_is_one_line(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert_refused(call(*RESNET), r"'timm': pip install 'manifold-mixup\[vision\]'")


def test_data_flow_that_is_lost_is_one_line(call, tmp_path):
    path = tmp_path / "net.py"
    path.write_text(
        "import torch\nfrom torch import nn\nclass Net(nn.Linear):\n"
        "    def forward(self, x): return torch.tensor(super().forward(x).tolist())\n"
        "def net(): return Net(4, 2), torch.ones(3, 4)\n"
    )
    assert_refused(call(f"{path}:net"), "No path of tensors leads from the inputs to the outputs of Net")


# ------------------------------------------------------------------ in a process of its own


def test_the_real_command_prints_a_table(net):
    done = process(f"{net}:Skip", "--input", "6")
    assert done.returncode == 0
    assert done.stderr == "a network that talks\n" * 2  # with two and with three rows
    assert [row[1] for row in rows(done.stdout)] == ["input", "first", "last"]


def test_the_real_command_refuses_in_one_line(net):
    done = process(f"{net}:Skip", "--input", "6", "-l", "branch")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"^error: 'branch' is not a cut point.*'first'.*\n\Z", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------ the guide


def shown():
    """The commands of the guide, with the output that it shows below them."""
    found = []
    for block in blocks(GUIDE, "text"):
        if block.follows is not None and block.follows.language == "bash":
            found.append((block.follows.content.strip(), block.content))
    return found


@pytest.mark.parametrize(("command", "output"), shown(), ids=lambda text: text.split("\n")[0][:60])
def test_the_guide_shows_what_the_command_prints(call, command, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(GUIDE, "python"):
        if block.content.startswith('"""unet.py'):
            (tmp_path / "unet.py").write_text(block.content)
    program, name, *arguments = command.replace("\\\n", " ").split()
    assert (program, name) == ("manifold-mixup", "layers")
    pytest.importorskip({"timm": "timm", "hf": "transformers"}.get(arguments[0].partition(":")[0], "torch"))
    _, out, err = call(*arguments)
    printed = [line.rstrip() for line in (out + err).strip().splitlines()]
    pattern = ".*".join(map(re.escape, "\n".join(line.rstrip() for line in output.strip().splitlines()).split("...")))
    assert re.fullmatch(pattern, "\n".join(printed), re.DOTALL), "\n".join(printed)


def test_the_guide_shows_a_residual_network_a_refusal_a_text_model_and_a_unet():
    text = "\n".join(command for command, _ in shown())
    for part in ("timm:resnet50", "--layer", "hf:Bert", "unet.py:"):
        assert part in text


TABLE = GUIDE.read_text("utf-8").partition("\n## What the command says")[2]
NETWORKS = re.findall(r"^\| `([^`]+)` \| (`[^|]+`) \|$", TABLE, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), NETWORKS, ids=[name[:40] for name, _ in NETWORKS])
def test_the_guide_says_what_the_command_says_of_well_known_networks(call, name, layers):
    for package in ("timm", "torchvision", "transformers"):
        pytest.importorskip(package)
    text = name.startswith("hf:") and "Sequence" in name
    code, out, _ = call(name, "--json", *(() if text else ("--meta",)))
    assert code == 0
    chosen = [entry["name"] for entry in map(json.loads, out.splitlines()) if entry["chosen"]]
    assert chosen == ([] if text else ["input"]) + re.findall(r"`([^`]+)`", layers)


def test_the_guide_speaks_of_many_networks():
    assert len(NETWORKS) >= 15
