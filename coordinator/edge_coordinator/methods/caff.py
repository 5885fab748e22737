"""CAFF: each device trains the deepest suffix that fits its memory, time and upload.

Pfeiffer, Ahmed, Khalili, Henkel: "Efficient Federated Finetuning of Tiny Transformers with Resource-Constrained Devices",
arXiv 2411.07826. Depth t_c = max { t : M(t) <= M_c, O(t) <= O_c, U(t) <= U_c }; aggregation per layer over the devices
that trained it; the head is always trained. Reading: a device's rows already satisfy its three budgets.
The rule itself is `edge_runtime/asks.py`'s.
"""

from __future__ import annotations

from edge_coordinator.methods.method import alone

METHOD = alone("caff")
