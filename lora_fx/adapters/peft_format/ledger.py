"""The keys of an adapter's file as they are asked for one by one, and the problems found on the way, which are raised together."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch

from lora_fx.adapters.peft_format.keys import Slot, base_key, token_key
from lora_fx.adapters.peft_format.opening import AdapterFiles
from lora_fx.adapters.peft_format.tensors import AdapterTensor
from lora_fx.errors import AdapterError
from lora_fx.graph.records import ParameterModule, TokenRows
from lora_fx.rules.peft_config.config import ALL_LINEAR, CONFIG_NAME, AdapterConfig
from lora_fx.rules.rule_file import Setting
from lora_fx.sites.call_sites import Site, attention_of, is_bare, is_idle, parameter_of


def is_selected(site: Site, config: AdapterConfig, keys: Collection[str]) -> bool:
    """Tell whether an adapter has factors beside a site, by its config, and where that leaves it to the model by its keys.

    Raises:
        TimeoutError: a regular expression takes too long.
    """
    if config.selects_parameter(parameter_of(site)):
        return True
    if is_bare(site):
        return False
    if str(config.target_modules).lower() == ALL_LINEAR or (
        config.target_modules is None and not config.target_parameters
    ):
        a, _ = Slot(site, site.module, site.module).keys
        return a in keys  # PEFT chose by the model, and wrote keys for its choice
    return config.selects(site.module)


class KeyLedger:
    """The keys of an adapter's file that no branch has taken yet, and the problems found on the way, which are raised together."""

    def __init__(self, files: AdapterFiles) -> None:
        self.unread = dict(files.file.entries)
        self.problems: list[str] = []
        self._directory, self._config, self._file_name = files.directory, files.config, files.file.path.name

    def stop_if_wrong(self) -> None:
        """Raise :class:`AdapterError` with all problems so far, if there are any."""
        if self.problems:
            raise AdapterError(str(self._directory), self.problems)

    def selects(self, site: Site) -> bool:
        """Tell whether the adapter has factors beside a site; see :func:`is_selected`."""
        try:
            return is_selected(site, self._config, self.unread)
        except TimeoutError as error:
            self.problems.append(f"{CONFIG_NAME}: {error}")
            return False

    def chosen(
        self, found: Collection[Site], modules: Mapping[str, ParameterModule]
    ) -> tuple[list[Site], dict[str, str]]:
        """Return the sites that the adapter has factors beside, and which of their modules are parts of an ``nn.MultiheadAttention``, with its path.

        Args:
            found: the sites of a graph, one of each module.
            modules: what is known of the model's modules, by their paths.
        """
        attentions = {}
        for site in found:
            owner = attention_of(site, modules)
            if owner is not None and self._selects_module(owner):
                attentions[site.module] = owner
        others = [site for site in found if site.module not in attentions and not is_idle(site, modules)]
        selected = {site.module for site in others if self.selects(site)} | attentions.keys()
        return [site for site in found if site.module in selected], attentions

    def _selects_module(self, module: str) -> bool:
        try:
            return self._config.selects(module)
        except TimeoutError as error:
            self.problems.append(f"{CONFIG_NAME}: {error}")
            return False

    def weights_of(self, chosen: Iterable[Site]) -> set[str]:
        """Return which of these sites' modules have a weight that ``target_parameters`` names; problems where PEFT adapts none."""
        weights = {s.module: s for s in chosen if not is_bare(s) and self._config.selects_parameter(parameter_of(s))}
        for module, site in weights.items():
            where = f"{CONFIG_NAME}: target_parameters names {parameter_of(site)!r}"
            if site.kernel:
                self.problems.append(
                    f"{where}, the weight of a convolution, which PEFT takes for a stack of matrices. Merge the adapter with PEFT, "
                    "and use the result"
                )
            if self._config.selects(module):
                self.problems.append(f"{where}, and target_modules selects its module: PEFT adapts one of the two")
        return set(weights)

    def setting_of(self, slot: Slot) -> Setting:
        """Return the settings of the branch at a slot; the default ones with a problem.

        In an ``nn.MultiheadAttention`` PEFT has no dropout, and what it has no way for is a problem.
        """
        try:
            setting = self._config.setting_of(slot.name)
        except TimeoutError as error:
            self.problems.append(f"{CONFIG_NAME}: {error}")
            return AdapterConfig(peft_type="LORA").setting_of(slot.name)
        if not slot.in_attention:
            return setting
        self.problems += [
            f"{CONFIG_NAME}: {kind}, and {slot.name!r} is an nn.MultiheadAttention, where PEFT has none"
            for kind, said in (("lora_bias", setting.bias), ("use_dora", setting.variant == "dora"))
            if said
        ]
        return replace(setting, dropout=0.0)

    def take(self, key: str, shape: tuple[int, ...], why: str, of: str) -> AdapterTensor | None:
        """Take a key from the unread ones, and return its entry; None with a problem.

        Args:
            key: in the file.
            shape: that it is to have.
            why: a key is expected, for the message where it is missing.
            of: the reason for the shape, for the message where it has another.
        """
        entry = self.unread.pop(key, None)
        if entry is None:
            self.problems.append(f"{key}: missing in {self._file_name}: {why}")
        elif entry.shape != shape:
            self.problems.append(f"{key}: expected shape {shape}, {of}, got {entry.shape}")
            return None
        return entry

    def take_rows(self, tokens: TokenRows, names: Iterable[str]) -> None:
        """Take the key of the values for rows of an embedding, and the keys of tied modules, under which PEFT writes the values again.

        Args:
            tokens: the rows.
            names: of their weight.
        """
        key, shape = token_key(tokens.module), (len(tokens.rows), tokens.width)
        why, of = f"{CONFIG_NAME} says {self._config.rows_key}", f"rows of {tokens.weight}"
        taken = self.take(key, shape, why, of)
        tied = () if tokens.alone else [token_key(name.removesuffix(".weight")) for name in names]
        for other in tied:
            again = self.take(other, shape, why, of) if other in self.unread else None
            if taken is not None and again is not None and not torch.equal(taken.read(), again.read()):
                self.problems.append(f"{other}: other values than {key}, for the rows of one weight")

    def statistics(self, norms: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Take the keys of the running statistics of batch norms that train as a whole, by the names of those."""
        taken = {}
        for name, tensor in norms.items():
            key = base_key(name, ())
            if self._config.saves_any(name) and key in self.unread:
                self.take(key, tuple(tensor.shape), f"{CONFIG_NAME} says modules_to_save", f"as {name} in the graph")
                taken[name] = key
        return taken
