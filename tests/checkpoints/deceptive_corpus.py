"""Files that two loaders would read as different weights, each with what has to become of it.

`C` are the weights that a careless reader sees, `B` those that torch, open_clip or timm would run.
No such file may be read in silence. `DECEPTIVE` is a part of the hostile corpus.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from pydetox.errors import CheckpointError
from tests.checkpoints.hostile_corpus import REFUSED, UNSAFE, Hostile, named, pt
from tests.checkpoints.zip_writer import Member, torch_members, zip_bytes

C, B = struct.pack("<4f", 1, 1, 1, 1), struct.pack("<4f", 9, 9, 9, 9)
HOOKS = b"ccollections\nOrderedDict\n)R"
VIEW = b"K\0K\4\x85K\1\x85"  # offset 0, shape (4,), strides (1,)

DECEPTIVE: list[Hostile] = []


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def old_text(value: str) -> bytes:
    """A text as Python 2 wrote it (SHORT_BINSTRING)."""
    return b"U" + bytes([len(value)]) + value.encode("latin1")


def storage(key: str, kind: str = "FloatStorage", count: int = 4, place: str = "cpu") -> bytes:
    head = b"(" + text("storage") + f"ctorch\n{kind}\n".encode()
    return head + text(key) + text(place) + b"K" + bytes([count]) + b"tQ"


def tensor(key: str = "0", more: bytes = b"", hooks: bytes = HOOKS, **of_storage: object) -> bytes:
    made = storage(key, **of_storage) + VIEW + b"\x89" + hooks + more  # type: ignore[arg-type]
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + made + b"tR"


def parameter(made: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_parameter\n(" + made + b"\x89" + HOOKS + b"tR"


def mapping(*pairs: bytes, kind: bytes = b"}") -> bytes:
    return kind + b"(" + b"".join(pairs) + b"u"


def weights(made: bytes, kind: bytes = b"}") -> bytes:
    return mapping(text("w") + made, kind=kind)


def file(root: bytes, records: dict[str, bytes] | None = None) -> bytes:
    return pt(b"\x80\x02" + root + b".", {"0": C, "1": B} if records is None else records)


def deceptive(
    name: str,
    error: type[CheckpointError] | None,
    expected: str,
    make: Callable[[], bytes],
) -> None:
    def build(folder: Path) -> Path:
        (folder / "a.pt").write_bytes(make())
        return folder / "a.pt"

    DECEPTIVE.append(Hostile(name, build, error, expected))


# ---- a tensor that is changed after it was made -------------------------------------------------

SET = b"(" + storage("1") + VIEW + b"t"  # the arguments of Tensor.set_
FOUR = b"(" + tensor("1") + b"\x89" + HOOKS + b"\x89t"
FIVE = b"(" + tensor("1") + b"N" + HOOKS + b"\x89Nt"
for name, made in {
    "a tensor": tensor() + SET + b"b",
    "a parameter, four values": parameter(tensor()) + FOUR + b"b",
    "a parameter, five values": parameter(tensor()) + FIVE + b"b",
    "a tensor, a dictionary": tensor() + mapping(text("data") + tensor("1")) + b"b",
}.items():
    deceptive(f"BUILD on {name}", UNSAFE, "changes a tensor after", lambda m=made: file(weights(m)))
deceptive(
    "BUILD on a tensor through the memo",
    UNSAFE,
    "changes a tensor after",
    lambda: file(weights(tensor() + b"q\1") + b"h\1" + SET + b"b0"),
)
deceptive(
    "items of a tensor are set",
    REFUSED,
    "sets items of something that is no dictionary",
    lambda: file(weights(tensor() + b"K\0G" + struct.pack(">d", 9) + b"s")),
)
for field in ("data", "real", "grad", "requires_grad", "__class__"):
    state = mapping(text(field) + tensor("1"))
    deceptive(
        f"the state of a parameter sets {field}",
        UNSAFE,
        f"sets the attribute '{field}' of a parameter",
        lambda s=state: file(
            weights(
                b"ctorch._utils\n_rebuild_parameter_with_state\n("
                + tensor()
                + b"\x89"
                + HOOKS
                + s
                + b"tR"
            )
        ),
    )
deceptive(
    "the state of a tensor of a class sets data",
    UNSAFE,
    "sets the attribute 'data' of a tensor",
    lambda: file(
        weights(
            b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\n"
            b"ctorch\nTensor\n("
            + storage("0")
            + VIEW
            + b"\x89"
            + HOOKS
            + b"t"
            + mapping(text("data") + tensor("1"))
            + b"tR"
        )
    ),
)
deceptive(
    "hooks on a tensor",
    UNSAFE,
    "has hooks",
    lambda: file(weights(tensor(hooks=b"}" + text("a") + b"K\1s"))),
)
for method in ("items", "keys", "get"):
    deceptive(
        f"a dictionary whose {method} is another one",
        UNSAFE,
        f"sets the attribute '{method}' of a dictionary",
        lambda m=method: file(
            weights(tensor(), kind=HOOKS) + mapping(text(m) + b"ccollections\nOrderedDict\n") + b"b"
        ),
    )

# ---- views --------------------------------------------------------------------------------------

for name, pairs, message in [
    ("a conjugate bit on real numbers", text("conj") + b"\x88", "do not fit float32"),
    ("a bit that is false", text("neg") + b"\x89", "hold 'neg', which is not understood"),
    ("metadata of another key", text("x") + b"\x88", "hold 'x', which is not understood"),
]:
    deceptive(name, REFUSED, message, lambda p=pairs: file(weights(tensor(more=mapping(p)))))
deceptive(
    "one record as two dtypes",
    UNSAFE,
    "is described in two ways",
    lambda: file(mapping(text("w") + tensor(), text("v") + tensor(kind="IntStorage"))),
)
deceptive(
    "one record as two sizes",
    UNSAFE,
    "is described in two ways",
    lambda: file(mapping(text("w") + tensor(), text("v") + tensor(kind="DoubleStorage", count=2))),
)
deceptive(
    "weights on the device meta",
    REFUSED,
    "its device is 'meta'",
    lambda: file(weights(tensor(place="meta"))),
)

# ---- which of two dictionaries ------------------------------------------------------------------

# _rebuild_qtensor(storage, offset, shape, strides, (scheme, scale, zero point), gradient, hooks)
QUANTISED = (
    b"ctorch._utils\n_rebuild_qtensor\n("
    + storage("1", kind="QInt8Storage", count=16)
    + VIEW
    + b"(ctorch\nper_tensor_affine\nG"
    + struct.pack(">d", 0.5)
    + b"K\0t\x89"
    + HOOKS
    + b"tR"
)
CLEAN, EVIL = weights(tensor("0")), weights(tensor("1"))
for name, root in {
    "state_dict and model_ema": mapping(text("state_dict") + CLEAN, text("model_ema") + EVIL),
    "state_dict and state_dict_ema": mapping(
        text("state_dict") + CLEAN, text("state_dict_ema") + EVIL
    ),
    "model, and state_dict as a string of Python 2": mapping(
        text("model") + CLEAN, old_text("state_dict") + EVIL
    ),
    "model, and state_dict as a Counter": mapping(
        text("model") + CLEAN,
        text("state_dict") + weights(tensor("1"), kind=b"ccollections\nCounter\n)R"),
    ),
    "model, and state_dict as a new OrderedDict": mapping(
        text("model") + CLEAN,
        text("state_dict") + weights(tensor("1"), kind=b"ccollections\nOrderedDict\n)\x81"),
    ),
    "model, and state_dict by str()": mapping(
        text("model") + CLEAN, b"cbuiltins\nstr\n" + text("state_dict") + b"\x85R" + EVIL
    ),
    "state_dict, and model_ema of an unknown class": mapping(
        text("state_dict") + CLEAN,
        text("model_ema") + weights(tensor("1"), kind=b"csomeproject\nWeights\n)\x81"),
    ),
    "state_dict, and model_ema of tensors that are not read": mapping(
        text("state_dict") + CLEAN, text("model_ema") + weights(QUANTISED)
    ),
    "state_dict, and parameters of other names beside it": mapping(
        text("state_dict") + CLEAN, text("clip.w") + tensor("1")
    ),
    "module, and a tensor that open_clip calls like a weight": mapping(
        text("module") + CLEAN, text("1234567w") + tensor("1")
    ),
    "net, and tensors of its names beside it": mapping(
        text("net") + CLEAN, text("w") + tensor("1")
    ),
    "tensors, and others of their names in an unusual dictionary": mapping(
        text("w") + tensor(), text("mine") + EVIL
    ),
    "model, and averaged weights under other names": mapping(
        text("model") + CLEAN, text("model_ema") + mapping(text("v") + tensor("1"))
    ),
    "model, and tensors beside it": mapping(text("model") + CLEAN, text("w") + tensor("1")),
}.items():
    deceptive(name, None, "several-weights", lambda r=root: file(r))
deceptive(
    "state_dict twice",
    None,
    "duplicate-key",
    lambda: file(mapping(text("state_dict") + CLEAN, text("state_dict") + EVIL)),
)
deceptive(
    "state_dict that is no dictionary, beside model",
    REFUSED,
    "its 'state_dict' is an object of 'someproject.Weights'",
    lambda: file(
        mapping(text("model") + CLEAN, text("state_dict") + b"csomeproject\nWeights\n)\x81")
    ),
)
for name, root in {
    "weights under an empty name, and tensors beside them": mapping(
        text("w") + tensor("1"), text("") + CLEAN
    ),
    "a name with a slash, and the same by two keys": mapping(
        text("x/y") + CLEAN, text("x") + mapping(text("y") + EVIL)
    ),
}.items():
    deceptive(name, REFUSED, "which names others, too", lambda r=root: file(r))
deceptive(
    "a name beyond ASCII as a string of Python 2",
    REFUSED,
    "string of Python 2 beyond ASCII",
    lambda: file(mapping(old_text("\xe9") + tensor(), text("w") + tensor("1"))),
)
deceptive(
    "some names with module. and some without",
    None,
    "mixed-prefix",
    lambda: file(mapping(text("module.w") + tensor(), text("w") + tensor("1"))),
)
deceptive(
    "a first name that begins like module. and is no tensor",
    None,
    "mixed-prefix",
    lambda: file(mapping(text("module_3") + b"N", text("visual.w") + tensor())),
)
deceptive(
    "a value that takes the place of a weight when names are cut",
    None,
    "mixed-prefix",
    lambda: file(mapping(text("module.w") + tensor(), text("modulesw") + b"N")),
)
deceptive(
    "some names with _orig_mod. and some without",
    None,
    "mixed-prefix",
    lambda: file(mapping(text("_orig_mod.w") + tensor(), text("w") + tensor("1"))),
)
deceptive(
    "a number of averaged models behind the weights",
    None,
    "mixed-prefix",
    lambda: file(
        mapping(text("module.ged") + tensor(), text("n_averaged") + tensor("1", kind="IntStorage"))
    ),
)
deceptive(
    "a weight that is taken away again",
    REFUSED,
    "holds no tensors",
    lambda: file(mapping(text("w") + tensor(), text("w") + b"N")),
)
deceptive(
    "quantised weights among others",
    REFUSED,
    "is an object of 'torch._utils._rebuild_qtensor', expected a tensor. Keep the tensors alone",
    lambda: file(mapping(text("w") + tensor(), text("v") + QUANTISED)),
)
deceptive(
    "an attack behind what is not understood",
    UNSAFE,
    "asks for 'posix.system'",
    lambda: file(
        mapping(
            text("act") + b"ctorch.nn.functional\nrelu\n",
            text("x") + b"cposix\nsystem\n" + text("true") + b"\x85R",
        )
    ),
)
deceptive(
    "a first name that begins like module.",
    None,
    "mixed-prefix",
    lambda: file(mapping(text("modules.w") + tensor(), text("v") + tensor("1"))),
)

# ---- records ------------------------------------------------------------------------------------


def beside(*more: Member, key: str = "0") -> bytes:
    members = torch_members(b"\x80\x02" + weights(tensor(key)) + b".", {key: C})
    return zip_bytes([*members[:1], *more, *members[1:]])


deceptive(
    "records that differ in case",
    UNSAFE,
    "are the same to torch, which ignores case",
    lambda: beside(Member("archive/data/W", B), key="w"),
)
deceptive(
    "DATA.PKL before data.pkl",
    UNSAFE,
    "are the same to torch, which ignores case",
    lambda: zip_bytes(
        [Member("archive/DATA.PKL", b"\x80\x02" + EVIL + b"."), *torch_members(CLEAN + b".")]
    ),
)
deceptive(
    "BYTEORDER beside no byteorder",
    UNSAFE,
    "torch finds it as",
    lambda: zip_bytes(
        [
            Member("archive/BYTEORDER", b"big"),
            *(m for m in torch_members(CLEAN + b".", {"0": C}) if "byteorder" not in m.name),
        ]
    ),
)
deceptive(
    "bytes behind the archive",
    REFUSED,
    "bytes behind the end of its zip archive",
    lambda: file(CLEAN) + b"hidden",
)

# ---- names that unpicklers translate ------------------------------------------------------------

for module, attribute in [
    ("urllib2", "urlopen"),
    ("httplib", "HTTPSConnection"),
    ("thread", "start_new_thread"),
    ("anydbm", "open"),
    ("Tkinter", "Tk"),
    ("commands", "getoutput"),
    ("imp", "load_source"),  # gone from newer interpreters than 3.11
    ("annotationlib", "call_annotate_function"),  # in newer ones only
]:
    deceptive(
        f"calls {module}.{attribute}",
        UNSAFE,
        "asks for",
        lambda m=module, a=attribute: pt(named(m, a)),
    )

# ---- files of torch before 1.6 ------------------------------------------------------------------


def legacy() -> bytes:
    buffer = io.BytesIO()
    state = {"w": torch.ones(4), "v": torch.full((4,), 9.0)}
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


deceptive(
    "before 1.6, with bytes behind the weights",
    UNSAFE,
    "ends with 3 hidden bytes",
    lambda: legacy() + b"abc",
)
deceptive(
    "before 1.6, with another size in front of the weights",
    REFUSED,
    "says another size than the pickle",
    lambda: legacy().replace(struct.pack("<q", 4), struct.pack("<q", 3)),
)
deceptive(
    "before 1.6, cut off in its weights",
    REFUSED,
    "truncated or damaged",
    lambda: legacy()[:-5],
)
deceptive(
    "before 1.6, of another byte order",
    REFUSED,
    "byte order",
    lambda: legacy().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"),
)
