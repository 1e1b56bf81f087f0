import json
import socket
import sys

import pytest
import torch
from torch import nn

from manifold_mixup import cut_points
from manifold_mixup.errors import NotACutPoint, UnsupportedModel
from manifold_mixup.lab.data import DATASETS
from manifold_mixup.lab.errors import MissingExtra, StorageError, UsageError
from manifold_mixup.lab.models import MODELS, build_model
from manifold_mixup.lab.networks import Network, build_network, survey

BERT = "hf:BertForSequenceClassification:hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32"
SMALL = ",vocab_size=60"

NET = """
import dataclasses
import torch
from torch import nn
from beside import WIDTH

@dataclasses.dataclass
class Sizes:
    width: int = WIDTH

def net(width=WIDTH, classes=3):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))

def with_tensor(): return net(), torch.ones(4, 5)
def with_tuple(): return Two(), (torch.ones(4, 5), torch.ones(4, 5))
def with_dict(): return Two(), {"left": torch.ones(4, 5), "right": torch.ones(4, 5)}
def with_text(): return net(), "text"
def need(width): return net(width)
def wrong(): return 3
def boom():
    print("half way")
    return 1 / 0
def leave(): raise SystemExit(3)
def parallel(): return nn.DataParallel(net()), torch.ones(4, 5)
ready = net()
number = 3

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 2)
    def forward(self, left, right):
        return self.body(left + right)
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "beside.py").write_text("WIDTH = 7")
    path = tmp_path / "net.py"
    path.write_text(NET)
    yield path
    sys.modules.pop("beside", None)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("something is about to be downloaded")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def same(network, model, *inputs, **kwargs):
    """Whether the network's cut points are those of a model built by hand."""
    return survey(network).points == cut_points(model.eval(), *inputs, **kwargs)


# ------------------------------------------------------------------ sources


def test_timm_is_create_model_without_weights():
    timm = pytest.importorskip("timm")
    network = build_network("timm:resnet18:num_classes=7", ["3,32,32"])
    assert type(network.model) is timm.models.ResNet
    assert network.model.fc.out_features == 7
    assert network.args[0].shape == (2, 3, 32, 32)
    assert same(network, timm.create_model("resnet18", num_classes=7), torch.randn(4, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:resnet18", (3, 224, 224)),
        ("timm:resnet18:in_chans=1", (1, 224, 224)),
        ("timm:vit_tiny_patch16_224:img_size=64,depth=1", (3, 64, 64)),
        ("timm:test_vit", (3, 160, 160)),
        ("torchvision:resnet18", (3, 224, 224)),
        ("torchvision:inception_v3", (3, 299, 299)),
        ("torchvision:r3d_18", (3, 16, 112, 112)),
    ],
)
def test_images_have_the_size_that_the_network_was_made_for(name, shape):
    pytest.importorskip(name.partition(":")[0])
    network = build_network(name, meta=True)
    assert [tuple(x.shape) for x in network.args] == [(2, *shape)]


def test_torchvision_is_get_model_without_weights():
    torchvision = pytest.importorskip("torchvision")
    network = build_network("torchvision:resnet18:num_classes=4", ["3,32,32"])
    assert same(network, torchvision.models.get_model("resnet18", num_classes=4), torch.randn(4, 3, 32, 32))


def test_no_backbone_is_downloaded_either():
    pytest.importorskip("torchvision")
    network = build_network("torchvision:lraspp_mobilenet_v3_large", ["3,32,32"])  # by default it fetches one
    assert "classifier.low_classifier" in dict(network.model.named_modules())


def test_transformers_is_the_class_with_its_configuration():
    transformers = pytest.importorskip("transformers")
    network = build_network(BERT + SMALL, ["6"])
    ids, mask = network.kwargs["input_ids"], network.kwargs["attention_mask"]
    assert (ids.shape, mask.shape) == ((2, 6), (2, 6))
    assert ids.dtype == torch.long
    assert 0 < int(ids.min()) <= int(ids.max()) < 60
    config = network.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (16, 3, 60)
    other = transformers.BertForSequenceClassification(transformers.BertConfig(**vars(config)))
    assert same(network, other, input_ids=ids, attention_mask=mask)
    assert "bert.encoder.layer.1" in survey(network).layers


def test_a_saved_configuration_is_read_and_options_come_after_it(tmp_path):
    pytest.importorskip("transformers")
    saved = tmp_path / "config.json"
    values = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    saved.write_text(json.dumps({"model_type": "bert", **values}))
    network = build_network("hf:BertForSequenceClassification:num_hidden_layers=2", config=saved)
    config = network.model.config
    assert (config.hidden_size, config.num_hidden_layers) == (16, 2)
    saved.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UsageError, match=r"config\.json describes a network of type 'gpt2', not 'bert'"):
        build_network(BERT, config=saved)
    for text, pattern in (("{", "is no JSON"), ("[]", "should hold a JSON object")):
        saved.write_text(text)
        with pytest.raises(UsageError, match=pattern):
            build_network(BERT, config=saved)
    with pytest.raises(StorageError, match=r"cannot read .*none\.json"):
        build_network(BERT, config=tmp_path / "none.json")
    with pytest.raises(UsageError, match="--config is for hf:CLASS"):
        build_network("mlp", config=saved)


TINY = {
    "GPT2ForSequenceClassification": (
        "n_embd=16,n_layer=2,n_head=2,vocab_size=50,n_positions=12",
        {"input_ids": (12,)},
    ),
    "T5ForConditionalGeneration": (
        "d_model=16,d_kv=8,num_layers=1,num_heads=2,d_ff=16,vocab_size=50",
        {"input_ids": (32,), "decoder_input_ids": (32,)},
    ),
    "T5ForSequenceClassification": (
        "d_model=16,d_kv=8,num_layers=1,num_heads=2,d_ff=16,vocab_size=50",
        {"input_ids": (32,)},
    ),
    "ModernBertForSequenceClassification": (
        "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,vocab_size=50",
        {"input_ids": (32,)},
    ),
    "ViTForImageClassification": (
        "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,image_size=24,num_channels=1,"
        "patch_size=8",
        {"pixel_values": (1, 24, 24)},
    ),
    "VideoMAEForVideoClassification": (
        "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,image_size=32,num_frames=4",
        {"pixel_values": (4, 3, 32, 32)},
    ),
    "ASTForAudioClassification": (
        "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,max_length=64,num_mel_bins=16",
        {"input_values": (64, 16)},
    ),
    "WhisperForAudioClassification": (
        "d_model=16,encoder_layers=1,decoder_layers=1,encoder_attention_heads=2,encoder_ffn_dim=16,"
        "max_source_positions=20,num_mel_bins=8",
        {"input_features": (8, 40)},
    ),
    "Wav2Vec2ForSequenceClassification": (
        "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,num_conv_pos_embedding_groups=2,"
        'conv_dim="[4,4]",conv_kernel="[10,10]",conv_stride="[8,8]"',
        {"input_values": (16000,)},
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_transformers_models_of_every_kind_of_input_run(name):
    pytest.importorskip("transformers")
    options, shapes = TINY[name]
    network = build_network(f"hf:{name}:{options}")
    given = {key: tuple(value.shape[1:]) for key, value in network.kwargs.items() if "mask" not in key}
    assert given == shapes
    survey(network)  # the forward takes them


def test_the_labs_own_networks_read_its_data_unless_told_otherwise():
    for name in (name for name, entry in MODELS.items() if entry.positional is None and not entry.graph):
        shapes = [d.info.shape for d in DATASETS.values()]
        assert tuple(build_network(name, meta=True).args[0].shape[1:]) in shapes
    network = build_network("preact_resnet8:width=4", ["1,12,12"])
    assert same(network, build_model("preact_resnet8", {"width": 4}, (1, 12, 12), 10), torch.randn(4, 1, 12, 12))


@pytest.mark.parametrize(
    ("factory", "inputs", "args", "kwargs"),
    [
        ("with_tensor", [], [(4, 5)], {}),
        ("with_tuple", [], [(4, 5), (4, 5)], {}),
        ("with_dict", [], [], {"left": (4, 5), "right": (4, 5)}),
        ("with_tensor", ["5"], [(2, 5)], {}),
        ("net", ["5"], [(2, 5)], {}),
        ("net:width=3", ["5"], [(2, 5)], {}),
        ("ready", ["5"], [(2, 5)], {}),
        ("Two", ["5", "right=5"], [(2, 5)], {"right": (2, 5)}),
    ],
)
def test_a_file_gives_a_module_and_perhaps_its_inputs(net, factory, inputs, args, kwargs):
    before = list(sys.path)
    network = build_network(f"{net}:{factory}", inputs)
    assert sys.path == before
    assert [tuple(x.shape) for x in network.args] == args
    assert {name: tuple(x.shape) for name, x in network.kwargs.items()} == kwargs
    assert survey(network).points[0].name == "input"
    if "width" in factory:
        assert network.model[0].out_features == 3
    assert not list(net.parent.rglob("net*.pyc"))


def test_building_leaves_the_global_random_state_alone_and_is_repeatable():
    before = torch.get_rng_state()
    first, second = build_network("mlp"), build_network("mlp")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.model.head.weight, second.model.head.weight)
    assert torch.equal(first.args[0], second.args[0])


# ------------------------------------------------------------------ inputs


@pytest.mark.parametrize(
    ("text", "dtype", "shape", "kind"),
    [
        ("3,8, 8", None, (2, 3, 8, 8), torch.float32),
        ("16:int", None, (2, 16), torch.int64),
        ("16", "int", (2, 16), torch.int64),
        ("16:float", "int", (2, 16), torch.float32),
        ("16:bool", None, (2, 16), torch.bool),
        ("t=", None, (2,), torch.float32),
        ("t=:int", None, (2,), torch.int64),
    ],
)
def test_inputs_are_shapes_of_one_example(tmp_path, text, dtype, shape, kind):
    path = tmp_path / "f.py"
    path.write_text("from torch import nn\nmodel = nn.Identity()")
    network = build_network(f"{path}:model", [text], dtype)
    (tensor,) = [*network.args, *network.kwargs.values()]
    assert (tuple(tensor.shape), tensor.dtype) == (shape, kind)
    assert list(network.kwargs) == (["t"] if text.startswith("t=") else [])
    assert kind == torch.float32 or {int(v) for v in tensor.flatten()} <= {0, 1}


BAD_INPUTS = {
    "": "should read",
    "3x4": "should read",
    "3,,4": "should be sizes",
    "3,0": "should be sizes",
    "=3": "should read",
    "3:half": "unknown kind of numbers 'half'",
}


@pytest.mark.parametrize("text", BAD_INPUTS)
def test_a_bad_input_is_named(text):
    with pytest.raises(UsageError, match=f"--input '{text}'.*{BAD_INPUTS[text]}"):
        build_network("mlp", [text])


def test_a_bad_dtype_and_a_repeated_input_are_named(net):
    with pytest.raises(UsageError, match="--dtype: unknown kind of numbers 'integer': did you mean 'int'"):
        build_network("mlp", ["3"], "integer")
    with pytest.raises(UsageError, match="'left' is given twice"):
        build_network(f"{net}:Two", ["left=5", "left=5"])
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="'input_ids' twice"):
        build_network(BERT, ["5", "6"])
    with pytest.raises(UsageError, match="unknown input of hf:Bert.* 'token_type': did you mean 'token_type_ids'"):
        build_network(BERT, ["token_type=5"])


# ------------------------------------------------------------------ errors

BAD = {
    "timm:resnet5O": "unknown timm network 'resnet5O': did you mean 'resnet50'",
    "timm:hf-hub:timm/resnet50": "'hf-hub:timm/resnet50'",
    "timm:resnet18:pretrained=true": "leave out 'pretrained'; .*never downloaded",
    "timm:resnet18:num_clases=3": "cannot be built: TypeError.*num_clases",
    "torchvision:resnt18": "unknown torchvision network 'resnt18': did you mean 'resnet18'",
    "torchvision:resnet18:weights=DEFAULT": "leave out 'weights'",
    "hf:BertForSequencClassification": "unknown transformers model class .*: did you mean 'BertForSequenceClass",
    "hf:BertTokenizer": "unknown transformers model class 'BertTokenizer'",
    "hf:zzzzqqqq": r"unknown transformers model class 'zzzzqqqq': dir\(transformers\) lists them",
    "hf:AutoModelForSequenceClassification": "name the model's own class",
    "hf:BertModel:hiden_size=8": "unknown option of BertConfig 'hiden_size': did you mean 'hidden_size'",
    "hf:BertModel:hidden_size=7": "cannot be built: ValueError.*7.*12",
    "hf:LlamaForSequenceClassification": "6.6 billion parameters: make it smaller .*--meta",
    "hf:PerceiverForSequenceClassification": "reads 'inputs': give the shape .*--input inputs=",
    "mlp:wdth=3": "'mlp:wdth=3': wdth: unknown key, did you mean 'width'",
    "resnet50": r"unknown network 'resnet50': it should read timm:NAME.*preact_resnet8.*timm:resnet50",
    "tim:resnet50": "unknown network 'tim:resnet50'.*did you mean 'timm'",
    "timm": "unknown network 'timm'",
    "timm:": "unknown network 'timm:'",
    "timm:resnet18:": "should read name",
    "mlp:depth": "'depth' should read key=value",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_or_option_is_named(name):
    for source, package in (("timm:", "timm"), ("torchvision:", "torchvision"), ("hf:", "transformers")):
        if name.startswith(source):
            pytest.importorskip(package)
    with pytest.raises(UsageError, match=BAD[name]):
        build_network(name)


BAD_FILES = {
    "need": "need cannot be called like that: missing a required argument: 'width'",
    "net:wdth=3": "net cannot be called like that: got an unexpected keyword argument 'wdth'",
    "wrong": "wrong should return an nn.Module, .*not an object of type 'int'",
    "number": "number should be a function .*not an object of type 'int'",
    "boom": r"line 22 in boom: ZeroDivisionError: division by zero",
    "leave": "in leave: SystemExit: 3",
    "nett": "has no 'nett': did you mean 'net'",
    "net": "net returns no inputs, so say what the network reads: --input",
    "with_text": "should be a tensor, tuple or dict, not an object of type 'str'",
    "": "should name what makes the network: .*:FACTORY",
}


@pytest.mark.parametrize("factory", BAD_FILES)
def test_what_is_wrong_with_a_file_is_one_line_that_names_it(net, factory, capsys):
    before = list(sys.path)
    with pytest.raises(UsageError, match=rf"net\.py.*{BAD_FILES[factory]}") as caught:
        build_network(f"{net}:{factory}" if factory else str(net))
    assert "\n" not in str(caught.value)
    assert sys.path == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("def f(:\n", r"f\.py, line 1: SyntaxError"),
        (
            "\nimport nowhere_to_be_found\n",
            r"f\.py, line 2: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        ),
        ("x = 1\nraise SystemExit\n", r"f\.py, line 2: SystemExit"),
        ("\0", r"f\.py.*SyntaxError"),
    ],
)
def test_a_file_that_does_not_run_names_the_line(tmp_path, text, pattern):
    path = tmp_path / "f.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=pattern):
        build_network(f"{path}:net")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read .*none\.py: No such file"):
        build_network(f"{tmp_path}/none.py:net")
    with pytest.raises(StorageError, match=r"cannot read .*folder\.py"):
        (tmp_path / "folder.py").mkdir()
        build_network(f"{tmp_path}/folder.py:net")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("timm:resnet18", "timm", "vision"),
        ("torchvision:resnet18", "torchvision", "vision"),
        (BERT, "transformers", "text"),
    ],
)
def test_a_missing_package_names_the_command_that_installs_it(monkeypatch, name, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"'{package}': pip install 'manifold-mixup\[{extra}\]'"):
        build_network(name)


def test_a_package_that_cannot_be_imported_says_why(monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "timm":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UsageError, match="'timm' cannot be imported: RuntimeError: operator torchvision::nms"):
        build_network("timm:resnet18")


def test_what_cannot_be_mixed_at_all_is_refused(net):
    with pytest.raises(UnsupportedModel, match="DataParallel"):
        build_network(f"{net}:parallel")


# ------------------------------------------------------------------ the survey


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle, self.up = nn.Linear(6, 6), nn.Linear(6, 60), nn.Linear(60, 6)
        self.out = nn.Linear(12, 2)

    def forward(self, x):
        h = self.down(x)
        return self.out(torch.cat([self.up(self.middle(h)), h], 1))


def network(model, *args, **kwargs):
    return Network(model, args, kwargs)


def test_a_survey_holds_the_cut_points_and_every_other_call_with_its_reason():
    model, x = UNet(), torch.randn(4, 6)
    found = survey(network(model, x))
    assert found.points == cut_points(model, x)
    assert [point.name for point in found.points] == ["input", "down", "out"]
    assert [(r.name, r.bypass) for r in found.refusals] == [("middle", "down"), ("up", "down")]
    assert found.refusals[0].reason.startswith("what 'down' computes reaches the model's own forward (cat)")
    entries = list(found.entries())
    assert [(e["name"], e["chosen"]) for e in entries] == [("input", True), ("down", True), ("out", False)]
    everything = list(found.entries(everything=True))
    assert everything[:3] == entries
    assert [(e["name"], e["cut_point"]) for e in everything[3:]] == [("middle", False), ("up", False)]


def test_a_stretch_without_cut_points_names_what_goes_past_it():
    notes = survey(network(UNet(), torch.randn(4, 6))).notes
    text = "\n".join(notes)
    assert "Between 'down' (5% of the compute) and 'out' (100% of the compute) none of 2 module calls" in text
    assert "middle, up: what 'down' computes reaches the model's own forward (cat)" in text
    assert survey(network(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), torch.randn(4, 6))).notes == []


def test_a_stretch_holds_what_lies_in_it_and_nothing_before_it():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.narrow, self.widen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 60)
            self.wide, self.last = nn.Linear(60, 60), nn.Linear(60, 2)

        def forward(self, x):
            h = self.first(x)
            h = self.widen(h + self.narrow(h))
            return self.last(h + self.wide(h))

    notes = survey(network(Twice(), torch.randn(4, 6))).notes
    assert [note.partition(":")[0] for note in notes] == [notes[0].partition(":")[0], "  wide"]
    assert "Between 'widen' (" in notes[0]
    assert "none of 1 module calls" in notes[0]


def test_a_network_that_can_be_mixed_at_the_input_alone_or_nowhere_says_so():
    def towers(forward):
        class Towers(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

            def forward(self, *inputs):
                return forward(self, *inputs)

        return Towers()

    x = torch.randn(4, 6)
    found = survey(network(towers(lambda m, x: m.left(x) * m.right(x)), x))
    assert found.layers == ["input"]
    assert "at the input alone, which is input mixup" in found.notes[0]
    assert "left: the input reaches 'right'" in "\n".join(found.notes)
    found = survey(network(towers(lambda m, x, i: m.left(x) * m.right(i.float())), x, torch.randint(2, (4, 6))))
    assert (found.points, found.layers) == ([], [])
    assert "can be mixed nowhere" in found.notes[0]


def test_ones_own_layers_are_checked():
    model, x = UNet(), torch.randn(4, 6)
    assert survey(network(model, x), ["out", "input"]).layers == ["out", "input"]
    with pytest.raises(NotACutPoint, match="'middle'.*'down'"):
        survey(network(model, x), ["middle"])


def test_a_forward_that_raises_says_what_it_was_given():
    with pytest.raises(UsageError) as caught:
        survey(network(nn.Linear(6, 2), torch.randn(4, 5)))
    assert "forward of Linear raised RuntimeError" in str(caught.value)
    assert "it was given (5,): say what it reads with --input" in str(caught.value)


def test_on_meta_the_answer_is_the_same():
    pytest.importorskip("timm")
    meta = build_network("timm:resnet18", ["3,32,32"], meta=True)
    assert all(parameter.is_meta for parameter in meta.model.parameters())
    assert survey(meta) == survey(build_network("timm:resnet18", ["3,32,32"]))


def test_on_meta_a_forward_that_needs_values_says_so():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(5, 2)

        def forward(self, x):
            return self.body(x if x.sum() > 0 else -x)

    with torch.device("meta"), pytest.raises(UsageError, match="with --meta there are no values.*leave --meta out"):
        survey(network(Deciding(), torch.randn(4, 5)))
