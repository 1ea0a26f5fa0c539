"""Which of the dictionaries in a pickle holds the weights.

Loaders differ: open_clip takes ``state_dict`` or else the whole dictionary, timm looks for averaged
weights first, and training scripts have their own names. One dictionary is read here. Where another
one holds other values under the same names, a loader may take that, and a finding says so.
"""

from __future__ import annotations

from pydetox.checkpoints.index import Findings, check_name, quote
from pydetox.checkpoints.pickle_values import Mapping, Opaque, PickledTensor, describe
from pydetox.errors import CheckpointError

# Where training scripts keep the weights, most common first; open_clip writes "state_dict",
# DeepSpeed "module".
_USUAL_KEYS = ("state_dict", "model_state_dict", "model", "module")
# Where some loader looks for weights: what differs there is never another matter.
_LOADERS_KEYS = frozenset(
    {*_USUAL_KEYS, "state_dict_ema", "model_ema", "ema_state_dict", "ema", "model_ema_state_dict"}
)
# What torch makes beside tensors.
_NO_TENSORS = frozenset(
    {"torch.Size", "torch.device", "torch.serialization._get_layout"}
    | {"torch.torch_version.TorchVersion"}
)
# Wrappers (DistributedDataParallel, torch.compile) put these in front of every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
#: How a user names the dictionary that the pickle holds, rather than one in it.
ROOT_KEY = "."
_SHOWN = 6


def choose_weights(
    root: object, findings: Findings, weights_key: str | None = None
) -> tuple[str, dict[str, PickledTensor]]:
    """Find the weights.

    Args:
        root: What the pickle holds.
        findings: Takes what is odd.
        weights_key: The dictionary that the user named: a key, keys with slashes between them, or
            ``"."`` for the root.

    Returns:
        The key (empty for the root), and name to tensor, without wrapper prefixes.

    Raises:
        CheckpointError: There are none, or nobody knows which ones are meant.
    """
    if not isinstance(root, Mapping):
        raise CheckpointError(f"holds {describe(root)}, expected a dictionary of tensors")
    entries = _entries(root, findings)
    candidates = _candidates(root, entries)
    if weights_key is not None:
        chosen = "" if weights_key == ROOT_KEY else weights_key
        if chosen not in candidates:
            raise CheckpointError(f"has no tensors under {quote(weights_key)}{_names(candidates)}")
    else:
        chosen = _usual(entries, candidates)
    mapping = candidates[chosen]
    tensors = _tensors(mapping, findings)
    # Without a "state_dict", open_clip takes the root, whatever is nested in it.
    loaders = _LOADERS_KEYS if chosen == "state_dict" else _LOADERS_KEYS | {""}
    others = {
        other: "has other values under the same names"
        for other, rival in candidates.items()
        if other != chosen and _rivals(tensors, rival, everywhere=other in loaders)
    }
    if chosen and "" in candidates and "" not in others and _has_parameters(tensors, root):
        others[""] = "holds parameters of another model"  # which transformers, say, would take
    others |= _unread(entries, candidates)
    for other, what in others.items():
        if weights_key is None:
            findings.add(
                "several-weights",
                f"holds several sets of weights: {_shown(chosen)} is read, {_shown(other)} {what}, "
                "and another loader may take those; name the one that you mean with weights_key=, "
                f"such as {chosen or ROOT_KEY}",
            )
        else:
            findings.add(
                "chosen-weights",
                f"holds several sets of weights: {_shown(chosen)} is read, as it was asked for; "
                f"{_shown(other)} {what}, and nobody looked at those",
            )
    _note_mixed_prefix(list(tensors), findings)
    return chosen, dict(zip(strip_prefixes(list(tensors)), tensors.values(), strict=True))


def strip_prefixes(names: list[str]) -> list[str]:
    """Remove the wrapper prefixes that *every* name carries, each once and in any order."""
    left = list(_WRAPPER_PREFIXES)
    while names:
        prefix = next((p for p in left if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        left.remove(prefix)
        names = [name[len(prefix) :] for name in names]
    return names


def _entries(root: Mapping, findings: Findings) -> dict[str, object]:
    """The entries of the root with names; a key that could equal another one is refused."""
    entries: dict[str, object] = {}
    for key, value in root.pairs:
        if type(key) is str:
            if key in entries and not isinstance(value, PickledTensor):
                findings.add(
                    "duplicate-key", f"entry {quote(key)}: is there twice; the last one counts"
                )
            entries[key] = value
        elif not (key is None or isinstance(key, (bool, int, float, bytes))):
            raise CheckpointError(f"has an entry whose name is {describe(key)}, expected text")
    return entries


def _candidates(root: Mapping, entries: dict[str, object]) -> dict[str, Mapping]:
    """The dictionaries that hold tensors, by their key: the root, its entries, and theirs.

    One with the name of another is refused: the root is named by an empty key here, and nested keys
    have a slash between them.
    """
    known: dict[int, bool] = {}
    found = {"": root} if _holds_tensors(root, known) else {}
    for key, value in entries.items():
        if not isinstance(value, Mapping):
            continue
        seen = id(value) in known
        if _holds_tensors(value, known):
            if key in found or not key:
                raise CheckpointError(f"holds tensors under {quote(key)}, which names others, too")
            found[key] = value
        elif not seen:
            for name, nested in {n: v for n, v in value.pairs if type(n) is str}.items():
                if isinstance(nested, Mapping) and _holds_tensors(nested, known):
                    if f"{key}/{name}" in found:
                        raise CheckpointError(
                            f"holds tensors under {quote(f'{key}/{name}')}, which names others, too"
                        )
                    found[f"{key}/{name}"] = nested
    return found


def _holds_tensors(mapping: Mapping, known: dict[int, bool]) -> bool:
    """Whether any value under a name is a tensor; each dictionary is looked at once."""
    if id(mapping) not in known:
        known[id(mapping)] = any(
            type(key) is str and isinstance(value, PickledTensor) for key, value in mapping.pairs
        )
    return known[id(mapping)]


def _usual(entries: dict[str, object], candidates: dict[str, Mapping]) -> str:
    """The key under which loaders expect the weights."""
    if "state_dict" in entries and "state_dict" not in candidates:
        # open_clip takes it whatever it is.
        value = entries["state_dict"]
        what = "holds no tensors" if isinstance(value, Mapping) else f"is {describe(value)}"
        others = {key: mapping for key, mapping in candidates.items() if key}
        if not others and isinstance(value, Mapping) and value.pairs:
            _tensors(value, Findings())  # says what is in it
        raise CheckpointError(f"its 'state_dict' {what}{_names(others)}")
    for key in _USUAL_KEYS:
        if key in candidates:
            return key
    if "" in candidates:
        return ""
    if len(candidates) == 1:
        return next(iter(candidates))
    if not candidates:
        if entries:
            key, value = next(iter(entries.items()))
            raise CheckpointError(
                f"holds no tensors: its entry {quote(key)} is {describe(value)}, expected a tensor "
                "or a dictionary of tensors"
            )
        raise CheckpointError("holds no tensors")
    raise CheckpointError(
        f"holds {len(candidates)} sets of weights, and none under a usual name{_names(candidates)}"
    )


def _names(candidates: dict[str, Mapping]) -> str:
    """The keys that a user can choose from, for the end of a message."""
    if not candidates:
        return ""
    shown = [f"{quote(key or ROOT_KEY)} ({len(m.pairs)})" for key, m in candidates.items()]
    more = ", …" if len(shown) > _SHOWN else ""
    return f"; there are tensors under {', '.join(shown[:_SHOWN])}{more}: name one by weights_key="


def _shown(key: str) -> str:
    return quote(key) if key else "the outermost one"


def _tensors(mapping: Mapping, findings: Findings) -> dict[str, PickledTensor]:
    found: dict[str, PickledTensor] = {}
    for key, entry in mapping.pairs:
        if type(key) is not str:
            raise CheckpointError(f"has an entry whose name is {describe(key)}, expected text")
        if not isinstance(entry, PickledTensor):
            raise CheckpointError(f"entry {quote(key)} is {describe(entry)}, expected a tensor")
        if key in found:
            findings.add(
                "duplicate-key", f"tensor {quote(key)}: is there twice; the last one counts"
            )
        check_name(key, findings)
        found[key] = entry
    return found


def _rivals(tensors: dict[str, PickledTensor], other: Mapping, *, everywhere: bool) -> bool:
    """Whether another dictionary has, under a name of the weights, something else than they do.

    ``everywhere``: whether any other name is a difference as well.
    """
    ours = {_bare(name): tensor for name, tensor in tensors.items()}
    seen = set()
    for key, value in other.pairs:
        if type(key) is not str:
            continue
        mine = ours.get(_bare(key))
        seen.add(_bare(key))
        if value == mine or (mine is None and not everywhere):
            continue
        if isinstance(value, PickledTensor) or _may_be_tensor(value):
            return True
    return everywhere and seen != ours.keys()


def _has_parameters(tensors: dict[str, PickledTensor], root: Mapping) -> bool:
    """Whether tensors that are no weights stand in the root under names such as ``conv1.weight``.

    What training scripts write beside the weights, such as losses, has names without a dot.
    """
    ours = set(tensors.values())
    return any(
        type(key) is str and "." in key and isinstance(value, PickledTensor) and value not in ours
        for key, value in root.pairs
    )


def _unread(entries: dict[str, object], candidates: dict[str, Mapping]) -> dict[str, str]:
    """What a loader may take for weights and nobody reads here: key to what is there."""
    found = {}
    for key in sorted(_LOADERS_KEYS & entries.keys() - candidates.keys()):
        value = entries[key]
        if isinstance(value, Opaque) and not value.known:  # a dictionary, perhaps, to who has it
            found[key] = f"is {describe(value)}"
        elif isinstance(value, Mapping):
            opaque = next((v for _, v in value.pairs if _may_be_tensor(v)), None)
            if opaque is not None:
                found[key] = f"holds {describe(opaque)}"
    return found


def _may_be_tensor(value: object) -> bool:
    """Whether a value that is not read here is a tensor to a loader: quantised, sparse, unknown."""
    if not isinstance(value, Opaque) or value.name in _NO_TENSORS:
        return False
    return value.name.startswith("torch.") or not value.known


def _bare(name: str) -> str:
    """A name without the prefixes that some loader would remove."""
    while name.startswith(_WRAPPER_PREFIXES):
        name = name.partition(".")[2]
    return name


def _note_mixed_prefix(names: list[str], findings: Findings) -> None:
    """Note names of which loaders remove a prefix in different ways.

    open_clip cuts seven characters from all names when the first begins with "module", timm from
    each that begins with "module.".
    """
    carrying = [name for name in names if name.startswith("module.")]
    if len(carrying) == len(names):
        return
    if carrying or names[0].startswith("module"):
        odd = next(name for name in names if not name.startswith("module."))
        findings.add(
            "mixed-prefix",
            f"tensor {quote(odd)}: does not begin with 'module.' as others do; loaders remove that "
            "in different ways",
        )
