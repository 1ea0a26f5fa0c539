"""The names that the pickle of a checkpoint may ask for, and what becomes of them.

Nothing is ever looked up by a name in a file. The lists only decide what is said about it:

- Names on the allow-list are known to be harmless whoever unpickles them.
- Names that can run code under another loader, and any other name of Python's own library, of
  torch, numpy and the tools around them, are refused: what harmless checkpoints use of those is
  known.
- Classes of whole models, optimisers and the like, and a few functions, are refused as well, as
  what is not understood, not as an attack.
- Names of other packages (a project's own options, say) become a finding: nobody knows what another
  loader would run.

A name means what an unpickler makes of it. Unpicklers translate the spellings of Python 2
(``_compat_pickle`` of CPython), some only up to protocol 2: the list applies to what comes out, and
a name that two readers would translate differently is refused.
"""

from __future__ import annotations

import builtins
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass
from typing import Final

from pydetox.checkpoints.index import ITEM_SIZES, Findings, quote
from pydetox.errors import CheckpointError, UnsafeCheckpointError

MAX_NAME_BYTES = 256

STORAGES: Final = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}
#: Storages of tensors that can stand beside the weights and are not read: item sizes in bytes.
OTHER_STORAGES: Final = {
    "torch.QInt8Storage": 1,
    "torch.QUInt8Storage": 1,
    "torch.QInt32Storage": 4,
}
DTYPES: Final = {f"torch.{name}": name for name in ITEM_SIZES}

# Names that harmless checkpoints hold beside tensors (numpy scalars, option objects, sparse or
# quantised tensors). None of them can run a command whoever unpickles them; here they become an
# `Opaque` and are never looked up.
_NUMPY_SCALARS: Final = (  # noqa: SIM905
    "bool bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 "
    "longdouble complex64 complex128 str_ bytes_ datetime64 timedelta64 void object_"
).split()
_NUMPY_DTYPES: Final = (  # noqa: SIM905
    "Bool Int8 Int16 Int32 Int64 UInt8 UInt16 UInt32 UInt64 Float16 Float32 Float64 LongDouble "
    "Complex64 Complex128 Str Bytes DateTime64 TimeDelta64 Void Object"
).split()
_BIT_GENERATORS: Final = {
    "_mt19937": "MT19937",
    "_pcg64": "PCG64",
    "_philox": "Philox",
    "_sfc64": "SFC64",
}
# All of them only keep their arguments.
_EXCEPTIONS: Final = sorted(
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, BaseException)
)
_INERT: Final = frozenset(
    {
        "_codecs.encode",
        "_io.BytesIO",
        "_io.StringIO",
        "argparse.Namespace",
        "array._array_reconstructor",
        "array.array",
        "builtins.Ellipsis",
        "builtins.NotImplemented",
        "builtins.bool",
        "builtins.bytearray",
        "builtins.bytes",
        "builtins.complex",
        "builtins.dict",
        "builtins.float",
        "builtins.frozenset",
        "builtins.int",
        "builtins.list",
        "builtins.object",
        "builtins.range",
        "builtins.set",
        "builtins.slice",
        "builtins.str",
        "builtins.tuple",
        *(f"builtins.{name}" for name in _EXCEPTIONS),
        "collections.Counter",
        "collections.OrderedDict",
        "collections.defaultdict",
        "collections.deque",
        "copyreg._reconstructor",
        "datetime.date",
        "datetime.datetime",
        "datetime.time",
        "datetime.timedelta",
        "datetime.timezone",
        "decimal.Decimal",
        "fractions.Fraction",
        "http.HTTPMethod",
        "http.HTTPStatus",
        *(
            f"ipaddress.IPv{v}{kind}"
            for v in (4, 6)
            for kind in ("Address", "Interface", "Network")
        ),
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy._core.numeric._frombuffer",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy.core.numeric._frombuffer",
        "numpy.dtype",
        "numpy.finfo",
        "numpy.ma.MaskedArray",
        "numpy.ma.core.MaskedArray",
        "numpy.ma.core._mareconstruct",
        "numpy.matrix",
        "numpy.matrixlib.defmatrix.matrix",
        "numpy.ndarray",
        "numpy.poly1d",
        "numpy.rec.recarray",
        "numpy.record",
        "numpy.random._pickle.__bit_generator_ctor",
        "numpy.random._pickle.__generator_ctor",
        "numpy.random._pickle.__randomstate_ctor",
        "numpy.random.bit_generator.SeedSequence",
        "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
        *(f"numpy.{name}" for name in _NUMPY_SCALARS),
        *(f"numpy.dtypes.{name}DType" for name in _NUMPY_DTYPES),
        *(f"numpy.random.{module}.{name}" for module, name in _BIT_GENERATORS.items()),
        "random.Random",
        "re.Pattern",
        "re.RegexFlag",
        "re._compile",
        "signal.Signals",
        "statistics.NormalDist",
        "string.Template",
        "time.struct_time",
        "torch.Size",
        "torch.Tensor",
        "torch._tensor._rebuild_from_type_v2",
        "torch.tensor._rebuild_from_type_v2",  # of torch 1.7 and 1.8
        "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.per_channel_affine",
        "torch.per_channel_affine_float_qparams",
        "torch.per_channel_symmetric",
        "torch.per_tensor_affine",
        "torch.per_tensor_symmetric",
        "torch.serialization._get_layout",
        "torch.torch_version.TorchVersion",
        "types.GenericAlias",
        "types.SimpleNamespace",
        *(f"typing.{name}" for name in ("Any", "List", "Dict", "Optional", "Tuple", "Union")),
        "uuid.UUID",
        *(
            f"pathlib.{local}{name}"
            for local in ("", "_local.")
            for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath")
        ),
        "pathlib.WindowsPath",
        "pathlib._local.WindowsPath",
    }
)

# Modules of the standard library of every Python from 3.10 to 3.14 that this one may not have, and
# of Python 2, whose names some unpicklers translate.
_STDLIB_OF_OTHERS: Final = frozenset(
    """
    __phello__ _aix_support _android_support _apple_support _ast_unparse _blake2 _bootsubprocess
    _collections_abc _colorize _compat_pickle _crypt _datetime _hmac _interpchannels
    _interpqueues _interpreters _ios_support _md5 _missing_stdlib_info _msi _opcode_metadata
    _py_warnings _pydatetime _pylong _pyrepl _remote_debugging _sha1 _sha2 _sha256 _sha512
    _suggestions _sysconfig _testexternalinspection _types _wmi _zstd annotationlib compression
    string.templatelib tomllib aifc asynchat asyncore audioop binhex cgi cgitb chunk crypt
    distutils formatter imghdr imp lib2to3 macpath mailcap msilib nis nntplib ossaudiodev parser
    pipes smtpd sndhdr spwd sunau symbol telnetlib uu xdrlib AL BaseHTTPServer Bastion
    CGIHTTPServer Carbon ColorPicker ConfigParser Cookie DEVICE Dialog DocXMLRPCServer
    EasyDialogs FileDialog FL FrameWork GL HTMLParser MacOS MimeWriter Nav Queue ScrolledText
    SimpleDialog SimpleHTTPServer SimpleXMLRPCServer SocketServer StringIO SUNAUDIODEV Tix
    Tkconstants Tkdnd Tkinter UserDict UserList UserString W __builtin__ _abcoll _winreg aepack
    aetools al anydbm applesingle autoGIL bsddb buildtools cPickle cStringIO cd commands
    compiler cookielib copy_reg dbhash dircache dl dumbdbm dummy_thread dummy_threading
    exceptions fl flp fm fpformat future_builtins gdbm gensuitemodule gl hotshot htmlentitydefs
    htmllib httplib ic ihooks imageop imgfile imputil itertools jpeg macerrors macostools
    macresource markupbase md5 mhlib mimetools mimify multifile mutex new os2emxpath popen2
    posixfile rexec rfc822 repr rgbimg robotparser sets sgmllib sha sre statvfs stringold strop
    sunaudio test thread tkColorChooser tkCommonDialog tkFileDialog tkFont tkMessageBox
    tkSimpleDialog toaiff ttk urllib2 urlparse user videoreader whichdb xmllib xmlrpclib
    """.split()  # noqa: SIM905
)
# Packages in which everything that harmless checkpoints use is on the list above; what else they
# have can run code.
_KNOWN_PACKAGES: Final = (
    sys.stdlib_module_names
    | _STDLIB_OF_OTHERS
    | frozenset(IMPORT_MAPPING)
    | {module for module, _ in NAME_MAPPING}
    | {"torch", "torchvision", "torchaudio", "functorch", "numpy", "scipy", "pandas", "pydetox"}
    | {"pip", "setuptools", "pkg_resources", "wheel", "IPython", "ipykernel", "pytest", "_pytest"}
    | {"cloudpickle", "dill", "joblib", "jsonpickle", "torch_package", "numba", "cffi", "sh"}
)
# Where the classes of whole models and of the objects around them live. People save such objects;
# no reader can make anything of one without running its code.
_OBJECT_PACKAGES: Final = (
    "torch.nn.modules.",
    "torch.nn.parallel.",
    "torch.optim.",
    "torch.utils.data.",
    "torch.distributed.",
    "torch.amp.grad_scaler.",
    "torch.cuda.amp.grad_scaler.",
    "torch.ao.nn.",
    "torchvision.models.",
    "torchvision.ops.",
    "torchvision.transforms.",
    "pandas._libs.",
    "pandas.core.",
    "scipy.sparse.",
)
# Functions that stand in harmless checkpoints, as an activation or a type hint, and what such
# objects of other packages are made by. What they do depends on their arguments.
_FUNCTIONS: Final = frozenset(
    {
        "_operator.getitem",
        "_operator.or_",
        "builtins.type",
        "itertools.count",
        "pandas._libs.internals._unpickle_block",
        "pandas.core.indexes.base._new_Index",
        "pandas.core.indexes.datetimes._new_DatetimeIndex",
    }
)
_FUNCTION_PACKAGES: Final = ("torch._C._nn.", "torch.nn.functional.", "torch.nn.init.")
# Anywhere in a path they lead out of a harmless package: `harmless.os.system`.
_DANGEROUS_PARTS: Final = frozenset(
    {
        "__builtin__",
        "builtins",
        "ctypes",
        "importlib",
        "nt",
        "os",
        "pickle",
        "posix",
        "pty",
        "runpy",
    }
    | {"shutil", "socket", "subprocess", "sys"}
    | {"Popen", "__import__", "compile", "eval", "exec", "execfile", "getattr", "import_module"}
    | {"popen", "setattr", "system"}
)


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a pickle; ``known`` is false for one of another package (a finding)."""

    name: str
    known: bool = True


def resolve_global(module: str, name: str, protocol: int, findings: Findings) -> Global:
    """Describe the global that an unpickler would look up.

    Args:
        module: As it stands in the pickle.
        name: As it stands in the pickle.
        protocol: The one that the pickle has declared before.
        findings: Takes names of unknown packages.

    Raises:
        UnsafeCheckpointError: It could run code under another loader.
        CheckpointError: It is the class of a whole object, or two readers would look up different
            things.
    """
    translated = NAME_MAPPING.get((module, name))
    if translated is None:
        translated = IMPORT_MAPPING.get(module, module), name
    full = check_global(*translated, findings)
    if translated != (module, name) and protocol > 2:
        # CPython translates up to protocol 2, torch's own unpickler always.
        raise CheckpointError(
            f"its pickle asks for {quote(f'{module}.{name}')} in protocol {protocol}: some readers "
            f"take it for {quote(full)}, others do not"
        )
    return Global(full, full in _KNOWN)


_KNOWN: Final = frozenset({*_INERT, *STORAGES, *OTHER_STORAGES, *DTYPES})


def check_global(module: str, name: str, findings: Findings) -> str:
    """Return the full name of a global.

    Args:
        module: Where it is.
        name: What it is called there.
        findings: Takes names of unknown packages.

    Raises:
        UnsafeCheckpointError: It could run code under another loader.
        CheckpointError: It is the class of a whole object.
    """
    full = f"{module}.{name}"
    if full in _KNOWN:
        return full
    parts = full.split(".")
    well_formed = len(full) <= MAX_NAME_BYTES and all(part.isidentifier() for part in parts)
    if well_formed and full.startswith(_OBJECT_PACKAGES) and name[0].isupper() and "." not in name:
        raise CheckpointError(
            f"holds a whole object, of the class {quote(full)}, which nothing but its own code can "
            "read. Save the weights alone where you trust the file: torch.save(torch.load(FILE, "
            "weights_only=False).state_dict(), NEW_FILE)"
        )
    functions = well_formed and full.startswith(_FUNCTION_PACKAGES) and "." not in name
    if full in _FUNCTIONS or functions:
        raise CheckpointError(
            f"holds {quote(full)}, which is not understood here. Save the weights alone where you "
            "trust the file: torch.save(torch.load(FILE, weights_only=False)[KEY], NEW_FILE)"
        )
    if (
        not well_formed
        or parts[0] in _KNOWN_PACKAGES
        or any(part in _DANGEROUS_PARTS or part.startswith("__") for part in parts)
    ):
        raise UnsafeCheckpointError(
            f"its pickle asks for {quote(full)}, which is not on the list of harmless names: "
            "loading it elsewhere could run code"
        )
    findings.add(
        "unknown-global",
        f"its pickle asks for {quote(full)}: ignored here, another loader would import and call it",
    )
    return full
