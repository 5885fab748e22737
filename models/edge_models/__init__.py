"""Transformer families and where their checkpoints come from; one module each, nothing imported here.

`bert` is a model family (what `edge_runtime.model.Family` asks for), `hub` finds a checkpoint folder by name, and
`packages` takes files out of a package of the package index. Not the training code, and not the wire. May import
`edge_runtime`'s records, errors, weights and store; torch only below a family's `build`.
"""
