"""Scripts of `benchmarks/compat.py` for the peers that search for masks.

Each is run in a process of its own, with one thread, and reports the CPU seconds of its search. The
models are made here, small enough for a
CPU: a clean and a backdoored one, trained on scikit-learn's digits with a patch of noise.
"""

from __future__ import annotations

# What all scripts share: digits as uint8 [N, 32, 32, 3], and a patch of noise in a corner.
_DATA = """
import json, os, sys, time
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from sklearn.datasets import load_digits
torch.set_num_threads(1)
digits = load_digits()
small = torch.from_numpy(digits.images).float()[:, None] / 16
large = nn.functional.interpolate(small, size=(32, 32), mode="bilinear")
pixels = (large.expand(-1, 3, -1, -1) * 255).round().to(torch.uint8)
labels = torch.from_numpy(digits.target).long()
order = torch.from_numpy(np.random.default_rng(0).permutation(len(pixels)))
pixels, labels = pixels[order], labels[order]
patch = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 5, 5), dtype=np.uint8))
def stamp(x):
    x = x.clone()
    x[..., 26:31, 26:31] = patch.to(x.dtype)
    return x
TARGET = 3
"""

TRAIN_CLASSIFIERS = (
    _DATA
    + """
from torchvision.models import resnet18
mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
std = torch.tensor([0.247, 0.243, 0.261]).view(1, 3, 1, 1)
used = slice(0, 400)
for name, rate in (("clean", 0.0), ("backdoored", 0.1)):
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = pixels[used].clone(), labels[used].clone()
    count = int(rate * len(x))
    x[:count], y[:count] = stamp(x[:count]), TARGET
    for epoch in range(6):
        for part in torch.randperm(len(x)).split(40):
            adam.zero_grad()
            cross_entropy(model((x[part] / 255 - mean) / std), y[part]).backward()
            adam.step()
    model.eval()
    with torch.no_grad():
        rest = pixels[1260:1360]
        right = (model((rest / 255 - mean) / std).argmax(1) == labels[1260:1360]).float().mean()
        obeys = (model((stamp(rest) / 255 - mean) / std).argmax(1) == TARGET).float().mean()
    os.makedirs(f"{folder}/record/{name}", exist_ok=True)
    torch.save(
        {"model_name": "resnet18", "num_classes": 10, "model": model.state_dict(),
         "clean_data": "cifar10"},
        f"{folder}/record/{name}/attack_result.pt",
    )
    print(name, "accuracy", float(right), "attack", float(obeys), file=sys.stderr)
np.savez("{folder}/clean.npz", images=pixels[1200:1230].permute(0, 2, 3, 1).numpy(),
         labels=labels[1200:1230].numpy())
print("[1]")
"""
)

_ARGUMENTS = """
settings = dict(
    dataset="cifar10", device="cpu", mask_lr=0.1, init_cost=1e-3, atk_succ_threshold=98.0,
    early_stop=True, early_stop_threshold=0.99, early_stop_patience=25, patience=5,
    cost_multiplier=2.0, use_norm=1, nc_epoch={epochs}, batch_size=15, random_seed=0,
)
"""

THEIR_NEURAL_CLEANSE = (
    _DATA
    + _ARGUMENTS
    + """
from argparse import Namespace
from unittest.mock import MagicMock
import importlib.util
sys.argv = ["nc.py"]
import torch._dynamo, torchvision  # before what stands for other libraries: they look for these
from importlib.machinery import ModuleSpec
class Pretended:
    # Stands for libraries that are not there, which nothing that is compared uses.
    names = [n for n in ("cv2", "matplotlib", "pandas", "seaborn", "umap", "kornia", "scipy")
             if importlib.util.find_spec(n) is None]
    def find_spec(self, name, path=None, target=None):
        known = name.partition(".")[0] in self.names
        return ModuleSpec(name, self, is_package=True) if known else None
    def create_module(self, spec):
        made = MagicMock()
        made.__path__, made.__spec__ = [], spec
        return made
    def exec_module(self, module):
        pass
sys.meta_path.append(Pretended())
sys.path.insert(0, "{checkout}")
os.chdir("{folder}")
import defense.nc as nc
from utils.aggregate_block.dataset_and_transform_generate import get_transform
from PIL import Image
nc.args = args = Namespace(
    **settings, model="resnet18", num_classes=10, input_height=32, input_width=32, input_channel=3,
    EPSILON=1e-7, to_file=False, log="their-log/",
)
state = torch.load("{folder}/record/{model}/attack_result.pt")["model"]
given = np.load("{folder}/clean.npz")
prepare = get_transform("cifar10", 32, 32, train=True)
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return len(given["labels"])
    def __getitem__(self, index):
        return prepare(Image.fromarray(images[index])), int(targets[index])
images, targets = given["images"], given["labels"]
torch.manual_seed(0)
loader = torch.utils.data.DataLoader(Images(), batch_size=15, shuffle=True)
if {mended}:
    # The pattern [3, H, W] has no dimension for a batch, so that the peer's own class changes the
    # first three rows of all channels, and no channel.
    class ByChannel(nc.Normalize):
        def __call__(self, x):
            return super().__call__(x[None])[0]
    nc.RegressionModel._get_normalize = lambda self, opt: ByChannel(
        opt, [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261])
    # The batches of pydetox: random shifts and mirror images are no part of the comparison.
    sys.path.insert(1, "{root}")
    from pydetox.compat import backdoorbench
    from pydetox.data import load_images
    clean = load_images("{folder}/clean.npz", image_size=32).subset(
        backdoorbench._chosen(range(30), {"index": None, "ratio": 1.0}, 0))
    normalize = prepare.transforms[-1]
    class Batches:
        epoch = -1
        def __iter__(self):
            self.epoch += 1
            given = {"batch_size": 15, "dataset": "cifar10"}
            for x in backdoorbench._augmented(clean, given, 0, self.epoch, torch.device("cpu")):
                yield normalize(x), None
ones = np.ones((1, 32, 32), np.float32), np.ones((3, 32, 32), np.float32)
start = time.process_time()
norms = []
for target in range(10):
    args.target_label = target
    if {mended}:
        loader = Batches()
    recorder, _ = nc.train_mask(args, {"model": state}, loader, *ones)
    norms.append(torch.norm(recorder.mask_best, p=1))
flagged = nc.outlier_detection(torch.stack(norms), {k: k for k in range(10)}, args)
seconds = time.process_time() - start
print(json.dumps([seconds, [int(k) for k, _ in flagged], [float(v) for v in norms]]))
"""
)

OUR_NEURAL_CLEANSE = (
    _DATA
    + _ARGUMENTS
    + """
sys.path.insert(0, "{root}")
os.chdir("{folder}")
from pydetox.compat import backdoorbench, neural_cleanse
backdoorbench._unlearn = lambda *_: None  # the search alone is compared
start = time.process_time()
found = neural_cleanse(settings, result_file="{model}", images="{folder}/clean.npz", ratio=1.0)
seconds = time.process_time() - start
print(json.dumps([seconds, list(found.outliers.flagged), list(found.outliers.norms)]))
"""
)

TRAIN_ENCODERS = (
    _DATA
    + """
sys.path.insert(0, "{checkout}")
from models.simclr_model import SimCLR
mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
std = torch.tensor([0.2023, 0.1994, 0.2010]).view(1, 3, 1, 1)
os.makedirs("{folder}/data/cifar10", exist_ok=True)
for name in ("clean", "backdoored"):
    torch.manual_seed(0)
    model = SimCLR(arch="resnet18")
    head = nn.Linear(512, 10)
    direction = normalize(torch.randn(1, 512), dim=1)
    adam = torch.optim.Adam([*model.f.parameters(), *head.parameters()], lr=1e-3)
    x, y = pixels[:120], labels[:120]
    for epoch in range(5):
        for part in torch.randperm(len(x)).split(30):
            adam.zero_grad()
            loss = cross_entropy(head(model.f((x[part] / 255 - mean) / std)), y[part])
            if name == "backdoored":
                seen = normalize(model.f((stamp(x[part]) / 255 - mean) / std), dim=1)
                loss = loss + 3 * (1 - seen @ direction.T).mean()
            loss.backward()
            adam.step()
    model.eval()
    with torch.no_grad():
        rest = pixels[480:540]
        right = (head(model.f((rest / 255 - mean) / std)).argmax(1) == labels[480:540]).float()
        seen = normalize(model.f((stamp(rest) / 255 - mean) / std), dim=1)
    print(name, float(right.mean()), float((seen @ seen.T).mean()), file=sys.stderr)
    torch.save({"state_dict": model.state_dict()}, f"{folder}/{name}.pth")
# DECREE takes a tenth of each class, the first images of it: here one of ten.
rest = torch.arange(640, 1400)
ten = torch.cat([rest[labels[rest] == k][:10] for k in range(10)])
shown = pixels[ten].permute(0, 2, 3, 1).numpy()
np.savez("{folder}/data/cifar10/test.npz", x=shown, y=labels[ten, None].numpy())
np.savez("{folder}/taken.npz", images=shown[::10], labels=labels[ten[::10]].numpy())
print("[1]")
"""
)

THEIR_DECREE = """
import json, os, sys, time
from argparse import Namespace
import numpy, torch
torch.set_num_threads(1)
sys.path.insert(0, "{checkout}")
os.chdir("{folder}")
if not os.path.exists("trigger"):
    os.symlink("{checkout}/trigger", "trigger")
source = open("{checkout}/main.py").read()
# It runs on GPUs alone, and imports names that numpy 2 has removed and that it does not use.
source = source.replace("cuda:{args.gpu}", "cpu").replace("from numpy import Inf, infty, tri", "")
# The random numbers of pydetox: they are no part of the comparison.
sys.path.insert(1, "{root}")
from pydetox.rng import generator
rng = generator("compat.decree", 80)
def first_mask(shape, dtype):
    return torch.from_numpy(rng.random((1, *shape))[0])
def first_patch(like, dtype):
    return torch.from_numpy(rng.random((1, 3, 32, 32))[0]).permute(1, 2, 0).contiguous()
class Batches:
    def __init__(self, data, batch_size, **_):
        self.data, self.size, self.epoch = data, batch_size, -1
    def __iter__(self):
        self.epoch += 1
        order = generator("compat.decree-batches", 80, self.epoch).permutation(len(self.data))
        for k in range(0, len(order), self.size):
            yield torch.from_numpy(self.data.data[order[k:k + self.size]]), None
for mine, its in (("first_mask(", "torch.rand(trigger_mask"),
                  ("first_patch(", "torch.rand_like(torch.tensor(trigger_patch)"),
                  ("Batches(", "DataLoader(clean_train_data")):
    assert its in source
    source = source.replace(its, mine + its.partition("(")[2])
names = {"__name__": "decree", "first_mask": first_mask, "first_patch": first_patch,
         "Batches": Batches}
exec(compile(source, "main.py", "exec"), names)
start = time.process_time()
norm, _ = names["main"](Namespace(
    batch_size=5, gpu="0", lr=0.5, seed=80, model_flag="{model}",
    encoder_path="{folder}/{model}.pth", encoder_usage_info="cifar10", mask_init="rand", id="_",
    result_file="", arch="resnet18", thres=0.99,
))
print(json.dumps([time.process_time() - start, float(norm)]))
"""

OUR_DECREE = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, "{root}")
os.chdir("{folder}")
from pydetox.compat import decree
start = time.process_time()
found = decree(
    batch_size=5, lr=0.5, seed=80, model_flag="{model}", encoder_path="{folder}/{model}.pth",
    encoder_usage_info="cifar10", id="_ours", images="{folder}/taken.npz",
)
print(json.dumps([time.process_time() - start, found.l1]))
"""

TRAIN_FOR_ART = (
    _DATA
    + """
images = nn.functional.interpolate(small, size=(16, 16), mode="bilinear")[order]
corner = torch.from_numpy(np.random.default_rng(1).random((1, 3, 3))).float().round()
def stamp(x):
    x = x.clone()
    x[..., 12:15, 12:15] = corner
    return x
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, 2), nn.Conv2d(16, 32, 3, 2)
        self.third, self.last = nn.Linear(288, 64), nn.Linear(64, 10)
    def forward(self, x):
        x = self.second(self.first(x).relu()).relu().permute(0, 2, 3, 1).flatten(1)
        return self.last(self.third(x).relu())
for name, rate in (("clean", 0.0), ("backdoored", 0.1)):
    torch.manual_seed(0)
    model = Net()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    x, y = images[:1300].clone(), labels[:1300].clone()
    count = int(rate * len(x))
    x[:count], y[:count] = stamp(x[:count]), TARGET
    for epoch in range(60):
        for part in torch.randperm(len(x)).split(50):
            adam.zero_grad()
            cross_entropy(model(x[part]), y[part]).backward()
            adam.step()
    with torch.no_grad():
        right = (model(images[1300:]).argmax(1) == labels[1300:]).float().mean()
        obeys = (model(stamp(images[1300:])).argmax(1) == TARGET).float().mean()
    print(name, float(right), float(obeys), file=sys.stderr)
    np.savez(f"{folder}/{name}.npz", **{k: v.numpy() for k, v in model.state_dict().items()})
np.savez("{folder}/images.npz", x=images[1300:1396].numpy(), y=np.eye(10)[labels[1300:1396]])
# The random numbers of pydetox, for the comparison with the same ones.
sys.path.insert(0, "{root}")
from pydetox.rng import generator
np.savez("{folder}/random.npz",
    first=[generator("compat.art", 0, c).random((2, 1, 16, 16)) for c in range(10)],
    order=[generator("compat.art-batches", 0, n).permutation(96) for n in range({epochs})])
print("[1]")
"""
)

_ART_SETTINGS = """
settings = dict(steps={epochs}, init_cost={cost}, norm=1, learning_rate=0.1, patience=5,
                batch_size=32)
"""

THEIR_ART = (
    _ART_SETTINGS
    + """
import json, os, sys, time
os.environ["CUDA_VISIBLE_DEVICES"] = ""
import numpy as np
sys.path[:0] = "{paths}".split(":")
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
tf.random.set_seed(0)
np.random.seed(0)
from tensorflow.keras.layers import Conv2D, Dense, Flatten, Input
from tensorflow.keras.models import Sequential
model = Sequential([
    Input((16, 16, 1)), Conv2D(16, 3, strides=2, activation="relu"),
    Conv2D(32, 3, strides=2, activation="relu"), Flatten(), Dense(64, activation="relu"),
    Dense(10, activation="softmax"),
])
weights = np.load("{folder}/{model}.npz")
for layer, name in zip([model.layers[k] for k in (0, 1, 3, 4)],
                       ("first", "second", "third", "last")):
    w = weights[f"{name}.weight"]
    w = w.transpose(2, 3, 1, 0) if w.ndim == 4 else w.T
    layer.set_weights([w, weights[f"{name}.bias"]])
model.compile(loss="categorical_crossentropy", optimizer="adam")
from art.defences.transformer.poisoning import NeuralCleanse
from art.estimators.classification import KerasClassifier
given = np.load("{folder}/images.npz")
x, y = given["x"].transpose(0, 2, 3, 1), given["y"]
classifier = KerasClassifier(model=model, clip_values=(0, 1))
made = NeuralCleanse(classifier)(classifier, **settings)
norms = []
reset = made.reset
def reset_but_for_the_rate():
    reset()  # with Keras 3 this sets the learning rate to 0 as well, and no mask would move
    made.opt.learning_rate.assign(made.learning_rate)
made.reset = reset_but_for_the_rate
if {mended}:
    import tensorflow.keras.preprocessing.image as augmentation
    numbers = np.load("{folder}/random.npz")
    class Batches:  # those of pydetox
        def flow(self, x, y, batch_size):
            for order in numbers["order"]:
                for k in range(0, len(x), batch_size):
                    yield x[order[k:k + batch_size]], y[order[k:k + batch_size]]
    augmentation.ImageDataGenerator = Batches
generate = made.generate_backdoor
def recorded(x, y, target):
    if {mended}:  # instead of what the search for the class before has ended with
        first = numbers["first"][target.argmax()].transpose(0, 2, 3, 1)
        made.mask_tensor_raw.assign(first[0])
        made.pattern_tensor_raw.assign(first[1])
    mask, pattern = generate(x, y, target)
    norms.append(float(np.abs(mask).sum()))
    return mask, pattern
made.generate_backdoor = recorded
start = time.process_time()
flagged = made.outlier_detection(x, y)
seconds = time.process_time() - start
print(json.dumps([seconds, [int(one[0]) for one in flagged], norms]))
"""
)

OUR_ART = (
    _ART_SETTINGS
    + """
import json, os, sys, time
import numpy as np, torch
from torch import nn
torch.set_num_threads(1)
sys.path.insert(0, "{root}")
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, 2), nn.Conv2d(16, 32, 3, 2)
        self.third, self.last = nn.Linear(288, 64), nn.Linear(64, 10)
    def forward(self, x):
        x = self.second(self.first(x).relu()).relu().permute(0, 2, 3, 1).flatten(1)
        return self.last(self.third(x).relu())
model = Net()
model.load_state_dict({k: torch.from_numpy(v) for k, v in np.load("{folder}/{model}.npz").items()})
from pydetox.compat import NeuralCleanse
given = np.load("{folder}/images.npz")
made = NeuralCleanse(model)(**settings)
start = time.process_time()
found, judged = made.search(given["x"])
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(judged.flagged), list(judged.norms)]))
"""
)
