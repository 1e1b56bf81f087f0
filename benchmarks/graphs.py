"""What a GraphMix step costs beside a plain one, and what sparse features save.

    python benchmarks/graphs.py [--data cora] [--data-dir DIR] [--rounds 30] [--threads 1] [--quick] [--json]

Steps of four kinds take turns on one graph, in an order that is shuffled for every round: forward on the whole graph,
cross-entropy of the labelled nodes, backward, Adam (fused).

* plain: the lab's GCN, whose features and adjacency stay sparse, dropout included;
* the naive way: PyTorch Geometric's own GCNConv with dense features, `F.dropout` on all of them, and edges as a list;
* the two kinds of GraphMix steps, on the graph and of the twin (ten predictions for the pseudo-labels, two mixed
  batches), which a coin decides between. "GraphMix" below is the mean of both.

Ratios are to the plain step of the same round: median and the 95 % interval of the median. Without --data-dir it is a
random graph of Cora's size. The time of a seed is that of 2,000 steps of the mean GraphMix step and as many
evaluations. Exits with 1 where the naive step is not at least 5 times as slow as the plain one, or a seed takes over 20
seconds. Needs the extras `lab` and `graph`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import ratios
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifold_mixup.lab.data import Graph, Places, load_data
from manifold_mixup.lab.methods import make_method
from manifold_mixup.lab.methods.base import Batch
from manifold_mixup.lab.models import build_model

NODES, FEATURES, CLASSES, WORDS, EDGES = 2708, 1433, 7, 18, 5278  # of Cora; words are non-zero features of a node
STEPS, SLOWEST, LEAST = 2000, 20.0, 5.0


class Dense(nn.Module):
    """The network as PyTorch Geometric's examples write it."""

    def __init__(self, features: int, classes: int, graph: Graph) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it scripts some of its classes, which PyTorch has deprecated
            from torch_geometric.nn import GCNConv

        self.first = GCNConv(features, 16, bias=False, cached=True)
        self.second = GCNConv(16, classes, bias=False, cached=True)
        self.x, self.edges = graph.features.to_dense(), graph.edges

    def forward(self, nodes: Tensor) -> Tensor:
        h = F.relu(self.first(F.dropout(self.x, 0.5, self.training), self.edges))
        out: Tensor = self.second(h, self.edges)
        return out[nodes]


def random_graph(scale: int) -> tuple[Graph, Tensor, Tensor]:
    """A graph of Cora's size, or of a part of it: graph, labelled nodes, their classes."""
    generator = torch.Generator().manual_seed(0)
    nodes, features = NODES // scale, FEATURES // scale
    columns = torch.rand(nodes, features, generator=generator).topk(WORDS).indices.flatten()
    index = torch.stack([torch.arange(nodes).repeat_interleave(WORDS), columns])
    values = torch.full((len(columns),), 1 / WORDS)
    x = torch.sparse_coo_tensor(index, values, (nodes, features), check_invariants=False)
    ends = torch.randint(nodes, (2, EDGES // scale), generator=generator)
    pairs = torch.cat([ends, ends.flip(0)], 1)[:, (ends[0] != ends[1]).repeat(2)]
    edges = torch.unique(pairs, dim=1)
    labelled = torch.arange(20 * CLASSES)
    return Graph(x.coalesce(), edges), labelled, labelled % CLASSES


def steps(graph: Graph, x: Tensor, y: Tensor, classes: int) -> dict[str, Callable[[], None]]:
    """One step of each kind, and an evaluation."""
    torch.manual_seed(0)
    net = build_model("gcn", {"init": "uniform"}, (graph.features.shape[1],), classes)
    net.place(graph)
    dense = Dense(graph.features.shape[1], classes, graph)
    known = torch.zeros(graph.nodes, dtype=torch.bool)
    known[x] = True
    others = (~known).nonzero().flatten()
    graphmix = {share: make_method("graphmix", {"features_share": share}) for share in (0.0, 1.0)}
    copies = {}
    for share, method in graphmix.items():
        copies[share] = build_model("gcn", {"init": "uniform"}, (graph.features.shape[1],), classes)
        copies[share].place(graph)
        method.attach(copies[share], [], 0)

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none").mean()

    def trained(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4, fused=True)

        def step() -> None:
            model.train()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return step

    def mixed(share: float) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            batch = Batch(x, y, others[torch.randint(len(others), (len(x),))], 1000, STEPS)
            return graphmix[share].step(copies[share], criterion, batch)

        return loss

    def evaluation() -> None:
        net.eval()
        with torch.no_grad():
            net(others)

    return {
        "plain": trained(net, lambda: criterion(net(x), y)),
        "naive, dense features": trained(dense, lambda: criterion(dense(x), y)),
        "GraphMix, on the graph": trained(copies[0.0], mixed(0.0)),
        "GraphMix, of the twin": trained(copies[1.0], mixed(1.0)),
        "evaluation": evaluation,
    }


def measure(kinds: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every kind, round by round."""
    order, shuffle = list(kinds), random.Random(0)
    for kind in order:
        kinds[kind]()
        kinds[kind]()
    found: dict[str, list[float]] = {kind: [] for kind in order}
    for _ in range(rounds):
        shuffle.shuffle(order)
        for kind in order:
            start = time.perf_counter()
            kinds[kind]()
            found[kind].append(time.perf_counter() - start)
    found["GraphMix"] = [
        (a + b) / 2 for a, b in zip(found["GraphMix, on the graph"], found["GraphMix, of the twin"], strict=True)
    ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cora", help="a graph of the lab; read only with --data-dir")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a graph of a tenth of the size, and no targets")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    name, classes = "random graph", CLASSES
    graph, x, y = random_graph(10 if options.quick else 1)
    if options.data_dir is not None:
        splits = load_data(options.data, {"features": "binary"}, 0, Places(options.data_dir))
        assert splits.graph is not None
        name, classes = options.data, len(splits.info.classes)
        graph, x, y = splits.graph, splits.train.x, splits.train.y
    seconds = measure(steps(graph, x, y, classes), options.rounds)
    per_seed = STEPS * (statistics.median(seconds["GraphMix"]) + statistics.median(seconds["evaluation"]))
    if options.json:
        print(json.dumps({"benchmark": "graphs", "graph": name, "seconds": seconds, "seconds_of_a_seed": per_seed}))
    else:
        print(f"{name}, {graph.nodes} nodes, {options.threads} threads, {options.rounds} rounds\n")
        print("| step | ms | time / plain | 95 % interval |\n| --- | --- | --- | --- |")
        for kind, times in seconds.items():
            found = ratios.paired_ratio(times, seconds["plain"])
            interval = "-" if found.interval is None else f"{found.interval[0]:.2f} to {found.interval[1]:.2f}"
            print(f"| {kind} | {1000 * statistics.median(times):.2f} | {found.median:.2f} | {interval} |")
        print(f"\n{STEPS} GraphMix steps with an evaluation after each: {per_seed:.1f} s")
    naive = ratios.paired_ratio(seconds["naive, dense features"], seconds["plain"]).median
    missed = not options.quick and (naive < LEAST or per_seed > SLOWEST)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
