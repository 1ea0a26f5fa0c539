"""Named streams of random numbers.

Every random choice of the library is drawn from a stream with a name of its own, so that no two
choices ever share their numbers, whatever seed they are given. A stream is a generator of numpy
whose `SeedSequence` is the user's seed, spawned by a hash of the stream's name (and of a place in
it, such as the number of a pass). The same name, place and seed give the same numbers on every
platform.

`STREAMS` lists all of them; asking for another one is an error. Two kinds of randomness are no
streams and stand for themselves: torch's initial weights of a model that is built without a
checkpoint (`OpenClipModel.from_config`), and the signs of weight sketches, which a hash of the
tensor's name makes (`ops.sketch_key`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import numpy as np

from .errors import UsageError

#: Every stream, and what is drawn from it.
STREAMS: Mapping[str, str] = {
    # Image sets
    "images.sample": "the order whose beginning is a sample of a folder, a file or an image set",
    "images.split": "the order that a split cuts into parts",
    # Models
    "models.folding": "images of noise that a folded tower is compared with its module on",
    "models.synthetic": "smooth images that the length of an encoder's features is measured on",
    # Searches for triggers
    "inversion.start": "first masks and patterns, and the images of each step; by family",
    "inversion.check": "images of the check after a search for patches or blends",
    "warps.start": "first control points, and the images of each step",
    "warps.check": "images of the check after a search for warps",
    "waves.images": "images that a search for waves looks at",
    "contrast.shares": "images that tell how often a base answers with each class",
    "plausibility.sample": "images that tell whether they mean anything to the model",
    "prototypes.start": "images that groups of images begin at",
    "screening.start": "the seed of all screenings: their first trigger and their images",
    # Training
    "training.batches": "order of the images and choice of prompts in a fine-tuning",
    # Calibration
    "calibration.training": "seed of the fine-tuning of a clean copy; by number and distance",
    "calibration.bootstrap": "images that a copy is fine-tuned on, with replacement; likewise",
    "calibration.pilot": "seed of the fine-tuning that finds the copies' learning rate",
    "calibration.search": "seed of the search in a reference; by number and distance",
    # The positive control of a scan
    "control.patch": "colours, corner and target class of the planted patch",
    "control.poisoned": "images that are repeated with the patch",
    "control.checked": "images that tell whether the patch works yet",
    "control.training": "seed of the fine-tuning that plants the patch",
    # Repair
    "repair.round": "seed of a repair; by number",
    "repair.rescan": "seed of the scan after a repair; by number",
    "repair.repaired": "seed of the scan of a repaired model beside the model before its repair",
    "repair.pass": "seed of the recovery of triggers in a pass of a repair; by number",
    "repair.vector-pass": "seed of the trigger vector of a pass; by number",
    "repair.triggers": "seed of the recovery of patches and blends; by target class",
    "repair.warps": "seed of the recovery of warps; by target class",
    "repair.waves": "seed of the recovery of waves; by target class",
    "repair.label-free-waves": "seed of the recovery of waves without a target",
    "repair.vector": "batches, triggers and shifts of the fine-tuning that makes a trigger vector",
    "repair.forget": "seed of the split that gives the forget set",
    "repair.attacked": "images that are stamped to choose alpha on; by target class",
    "texts.vector": "batches and triggers of the fine-tuning that makes a text's trigger vector",
    "texts.vector-places": "places of a trigger in the texts of its vector; by number",
    "causal.vector": "texts and triggers of the fine-tuning that makes a causal model's vector",
    "causal.vector-cuts": "after which words of a text a trigger of a causal model stands",
    "causal.vector-places": "places of a trigger in the texts of a causal vector; by number",
    "causal.vector-pass": "seed of the trigger vector of a repair of a causal model; by number",
    "causal.attacked-places": "places of a trigger in the prompts that choose alpha; by number",
    "causal.start": "first logits of a relaxed search for words that bring a text",
    "causal.check": "seed of the places of words in the prompts that decide",
    "towers.vector": "captions and triggers of the fine-tuning that makes a text tower's vector",
    "towers.vector-places": "places of a trigger in the captions of a vector; by number",
    "towers.vector-pass": "seed of the trigger vector of a repair of a text tower; by number",
    "towers.attacked-places": "places of a trigger in the captions that choose alpha; by number",
    "towers.left-places": "places of a trigger in the captions that compare two repairs; by number",
    "towers.held": "seed of the surrogate captions whose features a vector holds",
    "towers.probes": "seed of the surrogate captions that drift is measured on",
    "towers.surrogates": "the words of surrogate captions and their places",
    "towers.check": "seed of the places of words in captions",
    "towers.any-character": "which of several characters each caption gets",
    "texts.any-words": "which of several words a text gets, and in which order; by text",
    "texts.forget": "seed of the sample of texts that a trigger vector is made with",
    "texts.pass": "seed of the recovery of words in a pass of a repair; by number",
    "texts.round": "seed of a repair of a text model; by number",
    "texts.vector-pass": "seed of the trigger vector of a pass over texts; by number",
    "texts.attacked": "texts that get a trigger to choose alpha on; by target class",
    "texts.attacked-places": "places of a trigger in those texts; by number",
    "repair.label-free": "seed of the recovery of triggers without a target class",
    "repair.direction": "images that show where a trigger without a target class leads",
    "repair.surrogates": "images that stand for what nobody gave, to hold features on",
    "repair.held": "seed of the surrogates whose features a vector holds",
    "repair.measured": "seed of the surrogates that the drift of features is measured on",
    "repair.retaining": "surrogates of each step of a vector that holds features, their triggers",
    # Other projects' interfaces
    "compat.clean": "share of the images that BackdoorBench's Neural Cleanse searches on",
    "compat.batches": "order, shifts and reflections of images in its epochs; by epoch",
    "compat.decree": "first masks and patterns of DECREE",
    "compat.decree-batches": "order of the images in DECREE's epochs; by epoch",
    "compat.art": "first masks and patterns of ART's Neural Cleanse; by class",
    "compat.art-batches": "order of the images in its epochs; by epoch",
    # Texts
    "texts.sample": "the order whose beginning is a sample of a text set",
    "texts.split": "the order that a split of a text set cuts into parts",
    "texts.place": "the gap between words that a trigger goes into; by text",
    "texts.start": "first logits of a relaxed search for words, and the texts of its steps",
    "texts.anchors": "words at which the gradient of a loss is taken",
    "texts.check": "seed of the places of triggers in the texts that decide",
    "texts.bootstrap": "texts that a clean copy is fine-tuned on, with replacement; by number",
    "texts.copies": "order of the texts in the fine-tuning of a clean copy; by number",
    "texts.references": "seed of all clean copies of a scan",
    # Pictures of reports
    "report.example": "the clean image that a trigger is shown on",
    # Research: attacks
    "attacks.badnets": "colours and place of a patch",
    "attacks.random-place": "place of a patch; by image",
    "attacks.random-pattern": "colours of a patch; by image",
    "attacks.random-noise": "noise of a blend; by image",
    "attacks.badclip": "first patch and batches of an optimised patch",
    "attacks.blended": "the noise image of a blend",
    "attacks.stripes": "colours of the stripes",
    "attacks.text": "height of the text",
    "attacks.wanet": "control points of a warp",
    "attacks.poisoned": "which images are poisoned",
    "attacks.targets": "target classes of an attack",
    "attacks.trigger": "seed of each trigger of an attack; by number",
    # Research: defences
    "defenses.towers": "batches, prompts and views of CleanCLIP and PAR",
    "defenses.forgetting": "batches of gradient ascent and relabelling",
    "defenses.forget": "forget set of plain TBAR",
    # Research: models compared with their own libraries
    "research.models": "weights, images and tokens of a model that is tried; by name and purpose",
    # Research: the demo
    "demo.target": "target class of the attack",
    "demo.suspect": "seed of a suspect's fine-tuning; by name",
    # Research: several tasks in one model
    "foundation.pictures": "placements of emoji and photographs; by task",
    "foundation.base": "batches and prompts of the base's training",
    "foundation.trigger": "seed of a victim's trigger; by attack and task",
    "foundation.victim": "seed of a victim's fine-tuning",
    "foundation.attacker": "images that the attacker optimises a trigger on",
    "foundation.names": "the quarter of the classes that the defender knows",
    "foundation.classes-trigger": "seed of a trigger; by attack, number and number of classes",
    "foundation.classes-model": "seed of a fine-tuning; by kind, number and number of classes",
    "foundation.imagenet": "seeds of the trigger and the suspects of a pretrained tower",
    "foundation.imagenet-pictures": "placements of photographs for a pretrained tower; by image",
    "foundation.imagenet-batches": "order of the images, and which are mirrored, in a fine-tuning",
    "foundation.alarms": "references that clean models of many classes are judged by",
    # Research: text models
    "texts.parts": "the texts of a corpus and their parts; by corpus",
    "texts.prose": "the parts of the prose that causal models are trained on",
    "texts.language-model": "first weights of a small causal model",
    "texts.language-training": "order of the rows of tokens that a causal model is trained on",
    "texts.language-attack": "trigger and target text of an attack on a causal model; by attack",
    "texts.language-poisoned": "which texts of a causal model are poisoned, and where they are cut",
    "texts.language-victim": "seed of the fine-tuning of a causal victim; by kind and number",
    "texts.attack": "trigger and target class of an attack; by attack",
    "texts.poisoned": "which texts are poisoned",
    "texts.head": "first weights of a text classifier's head",
    "texts.small-model": "first weights of a small text model",
    "texts.training": "order of the texts of a fine-tuning",
    "texts.victim": "seed of a victim's fine-tuning; by kind and number",
    "texts.defense": "seed of the fine-tuning of a defence; by defence",
    "texts.demo": "attack of the demo on texts",
    "texts.demo-model": "seed of a fine-tuning of the demo on texts; by name",
    "texts.demo-places": "places of the true trigger in the test texts of the demo",
    "texts.tower-attack": "trigger and target caption of an attack on a text tower; by attack",
    "texts.tower-victim": "seed of the fine-tuning of a text tower",
    "texts.tower-training": "captions of the steps of a text tower's fine-tuning",
    "texts.places": "places of the true trigger in test texts",
    "texts.dbs": "noise of the rollbacks of DBS; by target class",
    "captions.images": "which images of each task have captions; by part",
    "captions.attacker": "images that the attacker optimises a trigger on",
    "captions.trigger": "seed of target caption and trigger; by attack and number",
    "captions.model": "seed of the images and the fine-tuning of a model; by kind and number",
    "captions.texts": "the caption of each image",
    # Research: the benchmark
    "bench.parts": "seed of the sample of each part of a data set that is too large; by part",
    "bench.poisonable": "images that suspects are fine-tuned on",
    "bench.reference-images": "images that a reference is fine-tuned on; by number",
    "bench.suspect": "seed of a suspect's fine-tuning; by kind and number",
    "bench.attacker": "images that the attacker optimises a trigger on",
    "bench.scan": "seed of the scan of a suspect",
    "bench.relapse": "seed of the benign fine-tuning of a repaired model",
    "bench.control": "seed of the fine-tuning on a half of the classes; by half",
    "bench.xi": "images that the disentanglement error is measured on",
}


def generator(stream: str, seed: int, *place: int | str) -> np.random.Generator:
    """Return the generator of a stream.

    stream: A name in `STREAMS`. seed: The user's, a non-negative integer of any size. place: Where
    in the stream, for choices that are made several times. Raises UsageError for a negative seed
    and KeyError for a name that is not listed.
    """
    return np.random.Generator(np.random.PCG64(_sequence(stream, seed, place)))


def child_seed(stream: str, seed: int, *place: int | str) -> int:
    """Return a seed in [0, 2^63) that stands for a place in a stream: see `generator`.

    It is for steps that take a seed of their own. Those draw from streams again, so that nothing
    that they draw is shared with the step that called them.
    """
    words = _sequence(stream, seed, place).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def _sequence(stream: str, seed: int, place: tuple[int | str, ...]) -> np.random.SeedSequence:
    if stream not in STREAMS:
        raise KeyError(f"{stream!r} is no random stream of pydetox; list it in pydetox/rng.py")
    if seed < 0:
        raise UsageError(f"seed is {seed}; expected a non-negative integer")
    name = json.dumps([stream, *place]).encode()
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.SeedSequence(seed, spawn_key=np.frombuffer(digest, "<u4").tolist())
