"""FLUX's modules by the names of the code that it was published with (black-forest-labs/flux, ``model.py``), which kohya's trainer goes by.

    double_blocks.0.img_attn.qkv    transformer_blocks.0.attn.to_q, .to_k and .to_v: the rows of one weight, in this order
    single_blocks.0.linear1         single_transformer_blocks.0.attn.to_q, .to_k, .to_v and .proj_mlp

The last modulation (``final_layer.adaLN_modulation.1``) is left out: diffusers has its halves in the other order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_OUTSIDE: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    **{
        f"{name}_in.{end}_layer": f"time_text_embed.{embedder}_embedder.linear_{place}"
        for name, embedder in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for end, place in (("in", 1), ("out", 2))
    },
}
_BLOCK = re.compile(r"(?P<stack>(?:single_)?transformer_blocks)\.(?P<index>\d+)\..+")


def names(modules: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the published names of a FLUX transformer's modules, each with the paths in diffusers whose outputs it stacks.

    Nothing is yielded for another model: one without both kinds of blocks.
    """
    found = {(block["stack"], int(block["index"])) for path in modules if (block := _BLOCK.fullmatch(path))}
    if len({stack for stack, _ in found}) < 2:
        return
    for stack, index in sorted(found):
        single = stack.startswith("single")
        for name, ends in (_SINGLE if single else _DOUBLE).items():
            paths = tuple(f"{stack}.{index}.{end}" for end in ends)
            if all(path in modules for path in paths):
                yield f"{'single' if single else 'double'}_blocks.{index}.{name}", paths
    yield from ((name, (path,)) for name, path in _OUTSIDE.items() if path in modules)
