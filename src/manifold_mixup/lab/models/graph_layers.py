"""Layers of PyTorch Geometric. Only :mod:`~manifold_mixup.lab.models.graph_nets` imports this, when it builds one."""

from __future__ import annotations

from torch import Tensor
from torch_geometric.nn import GATConv, GCNConv  # type: ignore[import-untyped]
from torch_geometric.nn.conv.gcn_conv import gcn_norm  # type: ignore[import-untyped]

from manifold_mixup.lab.models.sparse import product

__all__ = ["GATConv", "GraphConvolution", "gcn_norm"]


class GraphConvolution(GCNConv):  # type: ignore[misc]
    """``GCNConv`` on a symmetric adjacency matrix, whose backward does not transpose the matrix anew each time."""

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        """The sum over neighbours.

        Args:
            adj_t: A symmetric sparse CSR tensor, ``(nodes, nodes)``.
            x: ``(nodes, k)``.
        """
        start, index, values = adj_t.crow_indices(), adj_t.col_indices(), adj_t.values()
        return product(x, (start, index, values), (start, index))
