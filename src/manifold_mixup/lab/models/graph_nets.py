"""Networks that read the nodes of a graph: GCN (Kipf and Welling 2017) and GAT (Velickovic et al. 2018).

The layers are PyTorch Geometric's, the extra ``graph``. A network is given its graph once, and then numbers of nodes.
Features stay sparse throughout, for nearly all of them are zero in the citation networks.
"""

from __future__ import annotations

import importlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from manifold_mixup.lab.data.base import Graph
from manifold_mixup.lab.errors import UsageError
from manifold_mixup.lab.models.base import ModelEntry
from manifold_mixup.lab.models.sparse import Dropout, FeatureLinear, SparseMatrix
from manifold_mixup.lab.options import Options

__all__ = ["GAT", "GCN", "MODELS", "FeatureNet", "GATOptions", "GCNOptions", "GraphNet"]


class GraphOptions(Options):
    """What all networks on a graph can be told; the defaults are GraphMix's."""

    depth: int = Field(default=2, ge=1, description="layers, the last one included")
    input_dropout: float = Field(default=0.5, ge=0, lt=1, description="dropout of the features")
    hidden_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout after every activation; usually as large as input_dropout"
    )
    bias: bool = Field(default=False, description="whether layers add a bias, as PyTorch Geometric's do by default")
    init: Literal["glorot", "uniform"] = Field(
        default="glorot",
        description="first weights of the linear maps: glorot, or uniform within 1/sqrt(outputs) as in GraphMix's code",
    )


class GCNOptions(GraphOptions):
    """Size, regularisers and first weights."""

    hidden: int = Field(default=16, ge=1, description="units of each hidden layer")


class GATOptions(GraphOptions):
    """The same with heads."""

    hidden: int = Field(default=8, ge=1, description="units of each head of a hidden layer")
    heads: int = Field(default=8, ge=1, description="attention heads of a hidden layer; the last layer has one")


class GraphNet(nn.Module, ABC):
    """A network that is given one graph by :meth:`place`, and then classifies nodes of it by number.

    Layers are ``conv.1`` to ``conv.<depth>``; after all but the last come ``activation.<i>`` and dropout. The graph
    moves between devices with the network, and is no part of its state. Products with sparse matrices have no reduced
    precision: all is computed in that of the weights, under autocast as well.

    Args:
        layers: Layers of PyTorch Geometric, each of which has its linear map as ``lin``.
        activation: The class of the activations.
        options: The rates of dropout.
    """

    def __init__(self, layers: Sequence[Any], activation: type[nn.Module], options: GraphOptions) -> None:
        super().__init__()
        layers[0].lin = FeatureLinear(layers[0].lin.weight)
        self.input_dropout = Dropout(options.input_dropout)
        self.hidden_dropout = Dropout(options.hidden_dropout)
        self.conv = nn.ModuleDict({str(i): layer for i, layer in enumerate(layers, 1)})
        self.activation = nn.ModuleDict({str(i): activation() for i in range(1, len(layers))})

    @property
    def first(self) -> FeatureLinear:
        """The linear map of the first layer, which holds the features."""
        lin = self.conv["1"].lin
        assert isinstance(lin, FeatureLinear)
        return lin

    def place(self, graph: Graph) -> None:
        """Give the network its graph, in place of any that it had.

        Raises:
            UsageError: Nodes have another number of features, or an edge has one direction only.
        """
        weight, features = self.first.weight, graph.features.shape[1]
        if features != weight.shape[1]:
            raise UsageError(
                f"this network reads {weight.shape[1]} features of a node, but the graph's have {features}"
            )
        row, column = graph.edges
        if not torch.equal((column * graph.nodes + row).sort().values, (row * graph.nodes + column).sort().values):
            raise UsageError("networks on a graph need edges in both directions, but some have one only")
        self.first.features = SparseMatrix(graph.features.to(weight.device, weight.dtype).coalesce())
        self.connect(graph.edges.to(weight.device), graph.nodes)

    @abstractmethod
    def connect(self, edges: Tensor, nodes: int) -> None:
        """Prepare and keep what the layers are given as edges, with a loop at every node.

        Args:
            edges: int64, ``(2, m)``, without loops.
            nodes: How many nodes there are.
        """

    @abstractmethod
    def connections(self) -> Tensor:
        """What the layers are given as edges."""

    def forward(self, nodes: Tensor) -> Tensor:
        """From numbers of nodes, int64, ``(n,)``, to logits ``(n, classes)``; all nodes are computed.

        Raises:
            UsageError: The network has no graph yet.
        """
        entries = self.input_dropout(self.first.matrix().values)
        edges = self.connections()
        with torch.autocast(entries.device.type, enabled=False):
            x: Tensor = self.conv["1"](entries[:, None], edges)
            for i, activation in self.activation.items():
                x = self.conv[str(int(i) + 1)](self.hidden_dropout(activation(x)), edges)
        return x[nodes]

    def features_only(self) -> FeatureNet:
        """The network without edges, with the same weights. It is no part of this module."""
        return FeatureNet(self)


class FeatureLayer(nn.Module):
    """What a layer computes where the only edges are loops: its linear map and its bias, shared with the layer.

    The weight of a lone loop is 1 for both kinds of layers: D^-1/2 I D^-1/2 = I, and a softmax over one neighbour.

    Args:
        layer: The layer.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.lin = layer.lin
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """The linear map of rows."""
        return self.add_bias(self.lin(x))

    def add_bias(self, x: Tensor) -> Tensor:
        """The bias on top of rows."""
        return x if self.bias is None else x + self.bias


class FeatureNet(nn.Module):
    """A graph network's fully connected twin: the same weights, no edges. Rows do not see each other.

    It computes what the network would on a graph whose only edges are loops, for the nodes asked for alone. A node
    that is named twice has two dropout masks. Modules are named as in the network.

    Args:
        net: The network, placed now or later.
    """

    def __init__(self, net: GraphNet) -> None:
        super().__init__()
        # modules of its own wherever hooks or a mode matter
        self.input_dropout = Dropout(net.input_dropout.p)
        self.hidden_dropout = Dropout(net.hidden_dropout.p)
        self.conv = nn.ModuleDict({i: FeatureLayer(layer) for i, layer in net.conv.items()})
        self.activation = nn.ModuleDict({i: type(activation)() for i, activation in net.activation.items()})

    def forward(self, nodes: Tensor) -> Tensor:
        """From numbers of nodes, int64, ``(n,)``, to logits ``(n, classes)``.

        Raises:
            UsageError: The network has no graph yet.
        """
        first = self.conv["1"]
        assert isinstance(first, FeatureLayer)
        assert isinstance(first.lin, FeatureLinear)
        with torch.autocast(nodes.device.type, enabled=False):
            x = first.add_bias(first.lin.rows(nodes, self.input_dropout))
            for i, activation in self.activation.items():
                x = self.conv[str(int(i) + 1)](self.hidden_dropout(activation(x)))
        return x


class GCN(GraphNet):
    """Layers A X W with A = D^-1/2 (E + I) D^-1/2, E the edges and D the degrees with the loop, and ReLU.

    A node without edges keeps its loop, so that A is 1 there. So it does in GraphMix's files, which name such nodes in
    pairs with themselves.
    """

    def connect(self, edges: Tensor, nodes: int) -> None:
        """Keep A, row by row."""
        weights = self.first.weight
        index, values = _layers().gcn_norm(edges, num_nodes=nodes, dtype=weights.dtype)
        self.adjacency = SparseMatrix(_coalesced(index, values, nodes))
        with warnings.catch_warnings():
            # said once in a process, at the first such tensor
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            self.connections()

    def connections(self) -> Tensor:
        """A as a sparse CSR tensor, made in a microsecond: kept as one it could not be copied with the network."""
        a = self.adjacency
        size = (len(a.start) - 1,) * 2
        return torch.sparse_csr_tensor(a.start, a.index, a.values, size, check_invariants=False)


class GAT(GraphNet):
    """Layers with attention over the neighbours and the node itself, and ELU. Attention has no dropout of its own."""

    edges: Tensor

    def connect(self, edges: Tensor, nodes: int) -> None:
        """Keep the edges and a loop at every node, sorted by the node that they lead to."""
        index = torch.cat([edges, torch.arange(nodes, device=edges.device).repeat(2, 1)], dim=1)
        coalesced = _coalesced(index, torch.ones(index.shape[1], device=edges.device), nodes)
        self.register_buffer("edges", coalesced.indices().flip(0).contiguous(), persistent=False)

    def connections(self) -> Tensor:
        """The edges, ``(2, m)``."""
        return self.edges


def _coalesced(index: Tensor, values: Tensor, nodes: int) -> Tensor:
    return torch.sparse_coo_tensor(index, values, (nodes, nodes), check_invariants=False).coalesce()


def _layers() -> Any:
    """PyTorch Geometric's layers.

    Raises:
        MissingExtra: It is not installed.
    """
    # Here, because the package of networks that the command `layers` looks at imports this one.
    from manifold_mixup.lab.networks.base import require

    # It warns of its own use of what torch has deprecated. Networks may be built on the meta device, where no tensor
    # of the library should come to lie.
    with warnings.catch_warnings(), torch.device("cpu"):
        warnings.simplefilter("ignore")
        require("torch_geometric", "graph")
        return importlib.import_module("manifold_mixup.lab.models.graph_layers")


def _features(name: str, shape: tuple[int, ...]) -> int:
    if len(shape) != 1:
        raise UsageError(f"model {name!r} reads rows of features, not examples of shape {shape}")
    return shape[0]


def _initialised(layers: Sequence[Any], options: GraphOptions) -> Sequence[Any]:
    """Layers come with Glorot's weights; redraw them if others are asked for."""
    if options.init == "uniform":
        for layer in layers:
            bound = 1 / math.sqrt(layer.lin.weight.shape[0])
            nn.init.uniform_(layer.lin.weight, -bound, bound)
    return layers


def build_gcn(options: GCNOptions, shape: tuple[int, ...], classes: int) -> GCN:
    """A GCN without a graph.

    Raises:
        MissingExtra: PyTorch Geometric is not installed.
        UsageError: An example is no row of features.
    """
    widths = [_features("gcn", shape), *[options.hidden] * (options.depth - 1), classes]
    make = _layers().GraphConvolution
    layers = [make(n_in, n_out, normalize=False, bias=options.bias) for n_in, n_out in pairwise(widths)]
    return GCN(_initialised(layers, options), nn.ReLU, options)


def build_gat(options: GATOptions, shape: tuple[int, ...], classes: int) -> GAT:
    """A GAT without a graph.

    Raises:
        As :func:`build_gcn`.
    """
    inputs = [_features("gat", shape), *[options.hidden * options.heads] * (options.depth - 1)]
    outputs = [*[(options.hidden, options.heads)] * (options.depth - 1), (classes, 1)]
    make = _layers().GATConv
    layers = [
        make(n_in, n_out, heads=heads, add_self_loops=False, bias=options.bias)
        for n_in, (n_out, heads) in zip(inputs, outputs, strict=True)
    ]
    return GAT(_initialised(layers, options), nn.ELU, options)


def _no_hidden_layers(options: GraphOptions) -> list[str]:
    """Hidden states of a graph network have a row for every node, not for the nodes asked for."""
    return []


MODELS = (
    ModelEntry(
        name="gcn",
        title="graph convolutional network with ReLU",
        options=GCNOptions,
        build=build_gcn,
        hidden=_no_hidden_layers,
        graph=True,
    ),
    ModelEntry(
        name="gat",
        title="graph attention network with ELU",
        options=GATOptions,
        build=build_gat,
        hidden=_no_hidden_layers,
        graph=True,
    ),
)
