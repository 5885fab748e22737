"""LoRA with one rank: every device trains adapters of the run's rank, and A and B are averaged separately.

LoRA itself is Hu et al., arXiv 2106.09685: a frozen matrix W becomes W + (alpha / r) B A, A (r, inputs), B (outputs, r).
`lora` is FedIT (Zhang et al., arXiv 2305.05644): with p_k = n_k / sum n,

    A <- sum p_k A_k        B <- sum p_k B_k

whose product is not the mean of the products. `ffa-lora` (Sun et al., arXiv 2403.12313) leaves A at its random start, so that
sum p_k (B_k A) = (sum p_k B_k) A is exact, and only B is sent. Both ask for all blocks at the one rank; a device that cannot is
left out, as with `full`. `lora-suffix` is ours: the same rank in the deepest suffix that fits, averaged layer by layer, as CAFF.
The sums are the exact ones of every tensor (`aggregate.py`); what a device is asked for says `edge_runtime/asks.py`.
"""

from __future__ import annotations

from edge_coordinator.methods.method import alone

EVERYWHERE = alone("lora")
ONLY_B = alone("ffa-lora")
SUFFIX = alone("lora-suffix")
