"""The names of what an adapter brings along.

Of a branch these are the factors A and B, by which branches are nominated, and the places where B's rows go. An adapter may also
have trained copies of the model's own parameters, and values of its own for single rows of an embedding.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from torch import nn

from lora_fx.errors import PlanError
from lora_fx.graph.adapter_rows import BASE
from lora_fx.graph.codegen import is_usable_part
from lora_fx.graph.module_tensors import tensors_of_module

_FACTOR = re.compile(r"(.+\.)?lora_(?P<factor>[AB])\.(?P<adapter>[^.]+)(\.[^.]+)?\.weight")
_EMBEDDING_FACTOR = re.compile(
    r"(.+\.)?lora_embedding_[AB]\.(?P<adapter>[^.]+)"
)  # as PEFT names those of its own layers
_COPY = re.compile(r"(?P<module>(.+\.)?)(trained_copy|lora_rest)\.(?P<adapter>[^.]+)\.(?P<leaf>[^.]+)")
_FACTOR_BIAS = re.compile(r"(.+\.)?lora_[AB]\.(?P<adapter>[^.]+)\.bias")
_MAGNITUDE = re.compile(r"(.+\.)?lora_magnitude_vector\.(?P<adapter>[^.]+)\.weight")
_OF_OTHER_METHODS = re.compile(
    r"(.+\.)?(lora_(A|B|E|diag)|ranknum|(?:adamss|beft|boft|bone|c3a|deft|delora|fourierft|frod|glora|gralora|hada|hira|hra|ia3|lily"
    r"|ln_tuning|lokr|miss|oft|osf|peanut|poly|psoft|pvera|randlora|road|shira|supertuning|tinylora|trainable_tokens|unilora"
    r"|vblora|vera|waveft)_\w+)\.(?P<adapter>(?!(?:weight|bias)$)[^.]+)(\.[^.]+)?"
)  # <module>.<parameter>.<adapter>, as PEFT names them
_PLACES = re.compile(r".+\.lora_places\.(?P<adapter>[^.]+)\.[^.]+")
_START = re.compile(r"(.+\.)?lora_start_[AB]\.(?P<adapter>[^.]+)")
_TOKENS = re.compile(r"(.+\.)?token_adapter\.(?P<kind>trainable_tokens_delta|token_indices)\.(?P<adapter>[^.]+)")
_PREFIX = re.compile(r"prompt_encoder\.(?P<adapter>[^.]+)\.(embedding|transform\.[02])\.(weight|bias)")
_NOMINATING = (_FACTOR, _EMBEDDING_FACTOR, _FACTOR_BIAS, _MAGNITUDE, _OF_OTHER_METHODS)

_remembered = functools.lru_cache(maxsize=2**17)  # passes ask for every name of a graph, many times over


@dataclass(frozen=True)
class BranchNames:
    """The names of one branch.

    Attributes:
        owner: the module path after which they are named; ``<module path>@n`` where the n-th call has a branch of its own.
        adapter: the adapter that the branch belongs to.
        part: of a branch for one part of a fused projection, ``"query"`` for instance.
        mirrors: the owner of the branch whose factors it has, each as the transpose of the other one.
    """

    owner: str
    adapter: str
    part: str | None = None
    mirrors: str | None = None

    @property
    def a(self) -> str:
        """Parameter A, of shape ``(rank, in)``; of a mirrored branch the other one's B."""
        return f"{self.owner}.lora_A.{self._suffix}.weight" if self.mirrors is None else self._mirrored.b

    @property
    def b(self) -> str:
        """Parameter B, of shape ``(out, rank)``, with as many rows as the part has features; of a mirrored branch the other one's A."""
        return f"{self.owner}.lora_B.{self._suffix}.weight" if self.mirrors is None else self._mirrored.a

    @property
    def starts(self) -> tuple[str, str]:
        """Parameters A and B as they started, of a branch whose product was taken out of the weight; they never train."""
        return f"{self.owner}.lora_start_A.{self.adapter}", f"{self.owner}.lora_start_B.{self.adapter}"

    @property
    def bias(self) -> str:
        """Bias of B, of shape ``(out,)``, where it has one."""
        return f"{self.owner}.lora_B.{self._suffix}.bias"

    @property
    def magnitude(self) -> str:
        """Magnitudes of DoRA, one for each output feature."""
        return f"{self.owner}.lora_magnitude_vector.{self._suffix}.weight"

    @property
    def training_product(self) -> str:
        """Module that multiplies the dropped input by the weight in training, of DoRA with dropout."""
        return f"{self.owner}.lora_training_product.{self._suffix}"

    @property
    def places(self) -> str:
        """Buffer of a part: for each output feature of the site the row of B, or the number of rows for no row."""
        return f"{self.owner}.lora_places.{self._suffix}"

    @property
    def dropout(self) -> str:
        """Module of the branch's dropout."""
        return f"{self.owner}.lora_dropout.{self._suffix}"

    @property
    def _mirrored(self) -> BranchNames:
        return BranchNames(str(self.mirrors), self.adapter)

    @property
    def _suffix(self) -> str:
        return self.adapter if self.part is None else f"{self.adapter}.{self.part}"


def check_adapter_name(adapter: str) -> None:
    """Raise :class:`PlanError` if a new adapter cannot have this name, in the names of its parameters and as that of a directory."""
    if isinstance(adapter, str) and "." in adapter:
        raise PlanError(
            f"adapter={adapter!r} cannot be part of a parameter's name: a dot would let 'lora_A.{adapter}.weight' be read two ways. "
            f"Say {adapter.replace('.', '-').strip('-') or 'default'!r}."
        )
    if adapter == BASE:
        raise PlanError(f"adapter={adapter!r} is PEFT's name for rows without an adapter (adapter_names). Say 'base'.")
    usable = (
        isinstance(adapter, str) and bool(adapter) and is_usable_part(adapter) and not hasattr(nn.Module(), adapter)
    )
    # A factor of the adapter "lora_A" for the part "query" is called as one of the adapter "query" is.
    if not usable or "/" in adapter or adapter_of(BranchNames("proj", adapter, "query").b) != adapter:
        raise PlanError(
            f"adapter={adapter!r} cannot be part of a parameter's name: use letters, digits, hyphens and underscores, and no word that "
            "Python, torch.nn.Module or the names of factors use."
        )


@_remembered
def is_factor(name: str) -> bool:
    """Tell whether a parameter name is that of a factor."""
    return original_name(name) is None and any(p.fullmatch(name) for p in (_FACTOR, _EMBEDDING_FACTOR))


@_remembered
def is_of_branch(name: str) -> bool:
    """Tell whether a tensor of this name nominates a branch for folding: a factor, what belongs to one, or a tensor of another method of PEFT."""
    return original_name(name) is None and any(pattern.fullmatch(name) for pattern in _NOMINATING)


def is_factor_b(name: str) -> bool:
    """Tell whether a parameter name is that of a factor B, behind the factor A."""
    match = _FACTOR.fullmatch(name)
    return match is not None and match["factor"] == "B" and is_factor(name)


def is_embedding_factor(name: str) -> bool:
    """Tell whether PEFT gives a factor beside an embedding this name; lora_fx names all factors alike."""
    return is_factor(name) and _EMBEDDING_FACTOR.fullmatch(name) is not None


def is_magnitude(name: str) -> bool:
    """Tell whether a parameter name is that of magnitudes of DoRA."""
    return original_name(name) is None and _MAGNITUDE.fullmatch(name) is not None


def is_places(name: str) -> bool:
    """Tell whether a buffer name is that of the places of a part's features."""
    return _PLACES.fullmatch(name) is not None


def copy_name(parameter: str, adapter: str) -> str:
    """Return the name of an adapter's trained copy of a parameter: ``head.weight`` → ``head.trained_copy.default.weight``."""
    path, dot, leaf = parameter.rpartition(".")
    return f"{path}{dot}trained_copy.{adapter}.{leaf}"


@_remembered
def original_name(name: str) -> str | None:
    """Return the name of the parameter that a trained copy, or what a start left of it, stands in for; None if this is no such name."""
    match = _COPY.fullmatch(name)
    return f"{match['module']}{match['leaf']}" if match else None


def token_names(module: str, adapter: str) -> tuple[str, str]:
    """Return the names of an adapter's values for rows of an embedding, as PEFT names them, and of the buffer with their numbers."""
    path = f"{module}.token_adapter".removeprefix(".")
    return f"{path}.trainable_tokens_delta.{adapter}", f"{path}.token_indices.{adapter}"


@_remembered
def is_token_values(name: str) -> bool:
    """Tell whether a parameter name is that of an adapter's values for rows of an embedding."""
    match = _TOKENS.fullmatch(name)
    return match is not None and match["kind"] == "trainable_tokens_delta"


def is_placement(name: str) -> bool:
    """Tell whether a buffer says where values of an adapter go: the places of a part's features, or the rows of an embedding."""
    return is_places(name) or (_TOKENS.fullmatch(name) is not None and not is_token_values(name))


def rest_name(parameter: str, adapter: str) -> str:
    """Return the name of what an adapter's start left of a weight: ``q.weight`` → ``q.lora_rest.default.weight``."""
    path, dot, leaf = parameter.rpartition(".")
    return f"{path}{dot}lora_rest.{adapter}.{leaf}"


def is_of_start(name: str) -> bool:
    """Tell whether a parameter is of the start of a branch, and never trains: the first factors, and what they left of the weight."""
    return _START.fullmatch(name) is not None or (original_name(name) is not None and ".lora_rest." in f".{name}")


def prefix_name(adapter: str, part: str = "embedding.weight") -> str:
    """Return the name of a parameter of an adapter's prefix, as PEFT has it."""
    return f"prompt_encoder.{adapter}.{part}"


def prefix_dropout(adapter: str) -> str:
    """Return the path of the module that drops elements of an adapter's prefix."""
    return f"prompt_encoder.{adapter}.dropout"


def is_of_prefix(name: str) -> bool:
    """Tell whether a parameter name is that of a prefix."""
    return _PREFIX.fullmatch(name) is not None


@_remembered
def is_of_adapter(name: str) -> bool:
    """Tell whether a tensor of this name belongs to an adapter."""
    other = is_placement(name) or is_of_start(name) or is_of_prefix(name)
    return is_of_branch(name) or other or original_name(name) is not None


@_remembered
def adapter_of(name: str) -> str | None:
    """Return the adapter that a tensor of this name belongs to, or None if it belongs to none."""
    patterns = (
        _COPY,
        *_NOMINATING,
        _PLACES,
        _START,
        _TOKENS,
        _PREFIX,
    )  # a copy of the weight of a module called lora_A is no factor
    match = next((match for pattern in patterns if (match := pattern.fullmatch(name))), None)
    return match["adapter"] if match else None


def adapters(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters in a graph, in the order of their first parameters."""
    found = (adapter_of(name) for name in tensors_of_module(module).parameters)
    return tuple(dict.fromkeys(name for name in found if name is not None))
