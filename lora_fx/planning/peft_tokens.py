"""Trainable tokens by a PEFT configuration: the embeddings that ``trainable_token_indices`` means, and who computes with their rows.

A list is for the input embedding, a mapping for modules by the ends of their names. Where the config of the model ties the head to the
input embedding, all modules that share the weight compute with the rows; else the module named alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_fx.errors import did_you_mean
from lora_fx.graph.info import GraphInfo
from lora_fx.graph.records import TokenRows
from lora_fx.rules.peft_config.config import AdapterConfig
from lora_fx.rules.peft_config.name_matching import is_named
from lora_fx.sites.call_sites import Site


@dataclass(frozen=True)
class Vocabulary:
    """What PEFT goes by at embeddings.

    Attributes:
        embedding: path of the module of the input embedding; None where the model does not say.
        tied: whether the config of the model ties the head to it.
    """

    embedding: str | None = None
    tied: bool = False

    @staticmethod
    def of(info: GraphInfo) -> Vocabulary:
        """Return that of the model that a graph was traced from."""
        return Vocabulary(next(iter(info.vocabulary), None), bool(getattr(info.config, "tie_word_embeddings", False)))


def token_rows(
    config: AdapterConfig,
    found: Sequence[Site],
    parameters: Iterable[tuple[str, ...]],
    vocabulary: Vocabulary,
    rule: str,
    problems: list[str],
) -> tuple[TokenRows, ...]:
    """Return the rows of embeddings that a configuration trains; what PEFT would refuse, or compute wrongly, goes into the problems.

    Args:
        config: the configuration.
        found: the sites of a graph.
        parameters: those that the graph reads, each by all of its names.
        vocabulary: of the model.
        rule: name of the rules, for the record.
        problems: grows.
    """
    key = config.rows_key
    names_of = {name: names for names in parameters for name in names}
    modules = [name.removesuffix(".weight") for name in names_of if name.endswith(".weight")]
    wanted = list(_with_rows(_named(config, vocabulary, modules), names_of, found, key, problems))
    of_input = names_of.get(f"{vocabulary.embedding}.weight", ()) if vocabulary.tied else ()
    together = [rows for module, rows in wanted if f"{module}.weight" in of_input]
    apart = any(rows != together[0] for rows in together)
    if apart and config.ensure_weight_tying:
        problems.append(f"{key}: ensure_weight_tying keeps one embedding, for which there are different rows")
    as_one = vocabulary.embedding in [module for module, _ in wanted] and not apart
    tokens = []
    for module, rows in wanted:
        tied = f"{module}.weight" in of_input and as_one
        if tied and module != vocabulary.embedding:
            continue  # the rows of the input embedding are its own too
        names = names_of[f"{module}.weight"]
        site = next(site for site in found if site.weight in names)
        width = site.out_features if site.op == "embedding" else site.in_features
        tokens.append(TokenRows(module, rows, f"{rule}:{key}", width, alone=len(names) > 1 and not tied))
        covered = {name.rpartition(".")[0] for name in (names if tied else (f"{module}.weight",))}
        problems += _refused(config, covered, module)
    return tuple(tokens)


def _named(
    config: AdapterConfig, vocabulary: Vocabulary, modules: Sequence[str]
) -> Iterator[tuple[str, tuple[int, ...], list[str]]]:
    """Yield each name in a configuration, the rows for it, and the modules that it means."""
    given, embedding = config.trainable_token_indices, vocabulary.embedding or "embed_tokens"
    if config.has_rows_alone and not isinstance(given, Mapping):
        named = config.target_modules or embedding
        text = named if isinstance(named, str) else ", ".join(named)
        yield text, given or (), [module for module in modules if is_named(module, named)]
        return
    of_all = given if isinstance(given, Mapping) else {embedding: given} if given else {}
    for end, rows in of_all.items():
        yield end, rows, [module for module in modules if module.endswith(end)]


def _with_rows(
    named: Iterable[tuple[str, tuple[int, ...], Sequence[str]]],
    names_of: Mapping[str, tuple[str, ...]],
    found: Sequence[Site],
    key: str,
    problems: list[str],
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each module that names mean, with its rows."""
    for end, rows, meant in named:
        if not meant:
            ends = sorted({site.module.rpartition(".")[2] for site in found if site.op == "embedding"})
            problems.append(
                f"{key}: no embedding is {end!r}{did_you_mean(end, ends)}; the model has {', '.join(ends) or 'none'}"
            )
        for module in meant:
            names = names_of[f"{module}.weight"]
            site = next((site for site in found if site.weight in names and site.op in ("embedding", "linear")), None)
            if site is None or (site.op == "linear" and site.layout != "out_in"):
                problems.append(
                    f"{key}: {module!r} is neither an embedding nor a linear layer that the model computes with"
                )
                continue
            size = site.in_features if site.op == "embedding" else site.out_features
            beyond = [row for row in rows if row >= size]
            if beyond:
                problems.append(f"{key}: {module!r} has {size} rows, and {beyond[0]} is none of them")
            else:
                yield module, rows


def _refused(config: AdapterConfig, modules: Iterable[str], module: str) -> Iterator[str]:
    """Yield why PEFT refuses rows of a module that has a branch, or trains as a whole."""
    for each in sorted(modules):
        if config.selects(each):
            yield f"{config.rows_key}: {each!r} would have a branch too, which PEFT refuses. Name it in exclude_modules, or give a rule file"
        elif config.saves(each):
            yield f"{config.rows_key}: {each!r} trains as a whole (modules_to_save), with all rows of {module!r}. Leave one of the two out"
