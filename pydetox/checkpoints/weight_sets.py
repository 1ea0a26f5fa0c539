"""Which of the dictionaries in a pickle holds the weights.

Loaders differ: open_clip takes ``state_dict`` or else the whole dictionary, timm looks for averaged
weights first, and training scripts have their own names. One dictionary is read here. Where another
one holds something else that a model could take, a loader may take that, and a finding says so.
What a training script notes beside the weights (the best accuracy, a number of steps) is nothing
that a model could take.
"""

from __future__ import annotations

import math

from pydetox.checkpoints.index import Findings, check_name, quote
from pydetox.checkpoints.pickle_values import (
    Mapping,
    Opaque,
    PickledTensor,
    Storage,
    describe,
)
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
# Arrays of numpy, which a script may turn into weights.
_ARRAYS = ("._reconstruct", "._mareconstruct", "._frombuffer", "numpy.ndarray")
# torch.optim.swa_utils.AveragedModel counts here, in front of the weights of its `module`.
_AVERAGED = "n_averaged"
# Wrappers (DistributedDataParallel, torch.compile) put these in front of every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
#: How a user names the dictionary that the pickle holds, rather than one in it.
ROOT_KEY = "."
_SHOWN = 6
# BackdoorBench's entries beside the weights that tell what they are.
_NOTES = ("model_name", "clean_data")
_LONGEST_NOTE = 100
_CUT = len("module.")  # open_clip cuts so much from all names where the first begins with "module"


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
    tensors = _tensors(mapping, findings, candidates)
    _drop_average_count(mapping, tensors)
    if not tensors:
        raise CheckpointError("holds no tensors")
    # Without a "state_dict", open_clip takes the root, whatever is nested in it.
    loaders = _LOADERS_KEYS if chosen == "state_dict" else _LOADERS_KEYS | {""}
    others = {
        other: "has other values under the same names"
        for other, rival in candidates.items()
        if other != chosen
        and _rivals(tensors, rival, everywhere=other in loaders, is_root=not other)
    }
    if chosen and "" not in others and _has_parameters(root, set(tensors.values())):
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
    _note_mixed_prefix(mapping, list(tensors), findings)
    return chosen, dict(zip(strip_prefixes(list(tensors)), tensors.values(), strict=True))


def text_notes(root: object) -> dict[str, str]:
    """Return the short texts that name architecture and data set beside the weights, by key.

    BackdoorBench's results have both, or the first alone.
    """
    if not isinstance(root, Mapping):
        return {}
    found = {}
    for key, value in root.pairs:
        if key not in _NOTES or not isinstance(value, str) or len(value) > _LONGEST_NOTE:
            continue
        if value.isascii() and value.isprintable():
            found[str(key)] = value
    return found


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
            _tensors(value, Findings(), {})  # says what is in it
        raise CheckpointError(f"its 'state_dict' {what}{_names(others)}")
    for key in _USUAL_KEYS:
        if key in candidates:
            return key
    sets = [key for key, mapping in candidates.items() if key and _may_be_a_model(mapping)]
    if "" in candidates and (not sets or _is_model(candidates[""], [candidates[k] for k in sets])):
        return ""
    if len(sets or candidates) == 1:
        return next(iter(sets or candidates))
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


def _tensors(
    mapping: Mapping, findings: Findings, candidates: dict[str, Mapping]
) -> dict[str, PickledTensor]:
    """The tensors of a dictionary of weights, by name; what no model could take is left out."""
    found: dict[str, PickledTensor] = {}
    seen: set[str] = set()
    others = {id(other) for other in candidates.values()}
    for key, entry in mapping.pairs:
        if type(key) is not str:
            raise CheckpointError(f"has an entry whose name is {describe(key)}, expected text")
        if key in seen:
            kind = "tensor" if isinstance(entry, PickledTensor) else "entry"
            findings.add(
                "duplicate-key", f"{kind} {quote(key)}: is there twice; the last one counts"
            )
            found.pop(key, None)
        seen.add(key)
        if isinstance(entry, PickledTensor):
            check_name(key, findings)
            found[key] = entry
        elif not _is_no_weight(entry, others):
            raise CheckpointError(
                f"entry {quote(key)} is {describe(entry)}, expected a tensor. Keep the tensors "
                "alone where you trust the file: torch.save({k: v for k, v in torch.load(FILE)"
                ".items() if torch.is_tensor(v)}, NEW_FILE)"
            )
    return found


def _is_no_weight(value: object, others: set[int]) -> bool:
    """Whether no model could take a value for a weight, as an epoch or the state of a module.

    others: the dictionaries that are looked at as weights, by identity.
    """
    if isinstance(value, Mapping):
        return id(value) in others or not _holds_tensors(value, {})
    if isinstance(value, Opaque):
        return not _may_be_tensor(value) and not value.name.endswith(_ARRAYS)
    return not isinstance(value, Storage)


def _drop_average_count(mapping: Mapping, tensors: dict[str, PickledTensor]) -> None:
    """Leave out the number that `AveragedModel` writes in front of its weights.

    It has to be the first name, because open_clip then removes no prefix, and the only one without
    a prefix. No reader takes it for a weight of the averaged model.
    """
    entry = tensors.get(_AVERAGED)
    if entry is None or mapping.pairs[0][0] != _AVERAGED:
        return
    others = tensors.keys() - {_AVERAGED}
    if (
        (entry.entry.dtype, entry.entry.shape) == ("int64", ())
        and others
        and all(name.startswith("module.") for name in others)
        and f"module.{_AVERAGED}" not in others
    ):
        del tensors[_AVERAGED]


def _rivals(
    tensors: dict[str, PickledTensor], other: Mapping, *, everywhere: bool, is_root: bool
) -> bool:
    """Whether another dictionary has, under a name of the weights, something else than they do.

    everywhere: whether what has another name is a difference as well, if a model could take it; in
    the outermost dictionary (is_root), that needs the name of a parameter in a module.
    """
    ours = {_bare(name): tensor for name, tensor in tensors.items()}
    names = [key for key, _ in other.pairs if type(key) is str]
    cuts = bool(names) and names[0].startswith("module")
    seen: set[str] = set()
    for key, value in other.pairs:
        if type(key) is not str:
            continue
        called = {_bare(key)} | ({key[_CUT:]} if cuts else set())
        same = called & ours.keys()
        seen |= same
        if any(value != ours[name] for name in same):
            if isinstance(value, PickledTensor) or _may_be_tensor(value):
                return True
        elif not same and everywhere and ("." in key or not is_root) and _is_weight(value):
            return True
    return everywhere and bool(seen) and seen != ours.keys()


def _is_weight(value: object) -> bool:
    """Whether a value could be one of the weights of a model that has no other names than these.

    Single numbers, such as a loss, make no model.
    """
    if isinstance(value, PickledTensor):
        return math.prod(value.entry.shape) > 1
    return _may_be_tensor(value)


def _may_be_a_model(mapping: Mapping) -> bool:
    return any(type(key) is str and _is_weight(value) for key, value in mapping.pairs)


def _is_model(root: Mapping, nested: list[Mapping]) -> bool:
    """Whether the tensors in the root are weights, although dictionaries in it hold some, too."""
    names = {_bare(key) for mapping in nested for key, _ in mapping.pairs if type(key) is str}
    return _has_parameters(root, set()) or any(
        type(key) is str and isinstance(value, PickledTensor) and _bare(key) in names
        for key, value in root.pairs
    )


def _has_parameters(root: Mapping, known: set[PickledTensor]) -> bool:
    """Whether the root holds tensors under names such as ``conv1.weight``; known: not those.

    What training scripts write beside the weights, such as losses, is a number or has a name
    without a dot.
    """
    return any(
        type(key) is str
        and "." in key
        and isinstance(value, PickledTensor)
        and _is_weight(value)
        and value not in known
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


def _note_mixed_prefix(mapping: Mapping, names: list[str], findings: Findings) -> None:
    """Note names of which loaders remove a prefix in different ways.

    open_clip cuts seven characters from all names when the first begins with "module", timm removes
    "module." and "_orig_mod." from each name that begins with one of them.
    """
    keys = [key for key, _ in mapping.pairs if type(key) is str]
    bare = dict(zip(names, strip_prefixes(names), strict=True))
    cuts = keys[0].startswith("module")
    odd = {}
    for prefix in _WRAPPER_PREFIXES:
        without = [name for name in names if not bare[name].startswith(prefix)]
        if 0 < len(without) < len(names):
            odd[prefix] = without[0]
    if cuts and not all(name.startswith("module.") for name in names):
        odd.setdefault("module.", next(n for n in names if not n.startswith("module.")))
    if cuts:  # what is left out must not take a weight's place under its shorter name
        taken = set(bare.values())
        others = (key for key in keys if key not in bare and key[_CUT:] in taken)
        if (other := next(others, None)) is not None:
            odd.setdefault("module.", other)
    for prefix, name in odd.items():
        findings.add(
            "mixed-prefix",
            f"entry {quote(name)}: does not begin with {prefix!r} as others do; loaders remove "
            "that in different ways",
        )
