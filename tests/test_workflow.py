import copy
import json
import math
from dataclasses import replace

import pytest
import torch

import pydetox
from pydetox import ScanConfig, calibrate, detox, recover_warps, scan, unlearn
from pydetox.checkpoints import Provenance, load_checkpoint, save_checkpoint
from pydetox.cli.summaries import left_of_triggers
from pydetox.data import ImageSet
from pydetox.detect.control import plant_patch, planted_patch
from pydetox.detect.result import ScanResult
from pydetox.detect.statistics import Verdict
from pydetox.errors import DataError, OutputError, UsageError
from pydetox.evaluation import evaluate, predict
from pydetox.inversion import InversionConfig, InversionSearch
from pydetox.models import OpenClipModel
from pydetox.repair.configuration import UnlearnConfig
from pydetox.reporting import to_json
from pydetox.reporting.documents import detox_document, scan_document
from pydetox.reporting.result import control_line
from pydetox.research.attacks import PatchTrigger, poison
from pydetox.session import Session
from pydetox.training import TrainConfig, train_on_prompts
from tests.mini import CLASS_NAMES, MINI_CONFIG, mini_images, mini_model
from tests.test_training import TEMPLATES, coloured

TARGET = 0
TRIGGER = PatchTrigger(torch.full((3, 4, 4), 255, dtype=torch.uint8), 2, 2)
CONFIG = ScanConfig(
    inversion=InversionConfig(steps=80, batch_size=12),
    reference_training=TrainConfig(epochs=5, learning_rate=1e-3),
    references=3,
)
# A tower of one layer forgets nothing within the drift that is right for deeper ones.
UNLEARNING = UnlearnConfig(steps=60, learning_rate=1e-3, min_accuracy_kept=0.8, max_drift=0.1)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A base, a clean and a backdoored fine-tune of it, and images of the defender."""
    data = coloured(60)
    base = train_on_prompts(
        mini_model(), data, TEMPLATES, TrainConfig(epochs=40, learning_rate=3e-3, train_text=True)
    )
    base.name = "base"
    tuning = TrainConfig(epochs=80, learning_rate=3e-3, seed=1)
    poisoned, _ = poison(data, TRIGGER, TARGET, rate=0.25, seed=0)
    victim = train_on_prompts(base, poisoned, TEMPLATES, tuning)
    head = victim.zero_shot_head(CLASS_NAMES, TEMPLATES)
    planted = evaluate(victim, data, head, trigger=TRIGGER, target=TARGET)
    assert planted.attack_success_rate > 0.9
    path = save_checkpoint(
        tmp_path_factory.mktemp("story") / "victim",
        victim.storage_state_dict(),
        model_config=MINI_CONFIG,
        preprocess_config=None,
        provenance=Provenance(method="test"),
    )
    calibration = calibrate(base, data, templates=TEMPLATES, config=CONFIG)
    return base, path, data, calibration


def test_a_positive_control_says_what_a_clean_verdict_is_worth(story):
    base, _, data, calibration = story
    tuning = TrainConfig(epochs=5, learning_rate=1e-3, seed=7)
    clean = train_on_prompts(base, data, TEMPLATES, tuning)
    config = replace(CONFIG, positive_control=True)
    given = {"calibration": calibration, "templates": TEMPLATES}
    found = scan(clean, data, config=config, **given)
    assert found.verdict is Verdict.CLEAN
    control = found.control
    assert control is not None
    assert control.planted
    # What it says of the copy is what a scan of the copy says.
    session = Session.open(clean, data, templates=TEMPLATES)
    trigger = planted_patch(16, len(CLASS_NAMES), CONFIG.seed)
    planted, success = plant_patch(session, trigger, seed=CONFIG.seed)
    assert success == control.success
    assert trigger.target == control.target
    again = scan(planted, data, config=CONFIG, **given)
    assert again.control is None
    assert again.verdict.value == control.verdict
    assert again.detection.p_value == control.p_value
    head = clean.zero_shot_head(CLASS_NAMES, TEMPLATES)
    unlabelled = evaluate(
        planted,
        replace(
            data.in_content_order(), labels=predict(clean, data.in_content_order().images, head)
        ),
        head,
        trigger=trigger,
        target=control.target,
    )
    assert unlabelled.attack_success_rate == pytest.approx(success)
    assert unlabelled.clean_accuracy == pytest.approx(control.accuracy)
    document = scan_document(found)["positive_control"]
    assert (document["found"], document["asr"]) == (control.found, success)
    line = control_line(document)
    assert ("is found by" in line) == control.found
    assert scan_document(again)["positive_control"] is None


def test_a_planted_backdoor_is_found_removed_and_the_repair_written(story, tmp_path):
    _, path, data, calibration = story
    result = detox(
        path,
        data,
        calibration=calibration,
        output=tmp_path / "repaired",
        templates=TEMPLATES,
        config=CONFIG,
        unlearning=UNLEARNING,
    )
    assert result.verdict is Verdict.BACKDOORED
    assert result.before.target == TARGET
    assert result.before.sha256 == load_checkpoint(path).sha256
    repaired = load_checkpoint(result.path)
    for name, value in result.model.clip.state_dict().items():
        assert torch.equal(repaired.state_dict[name], value)
    head = result.model.zero_shot_head(CLASS_NAMES, TEMPLATES)
    after = evaluate(result.model, data, head, trigger=TRIGGER, target=TARGET)
    # 60 images of 16 pixels and a tower of one layer: tests/test_demo.py asserts the full strength.
    assert after.attack_success_rate <= 0.6
    assert repaired.provenance.source_sha256 == result.before.sha256
    assert repaired.provenance.scaling_coefficient == result.rounds[-1].search.coefficient
    assert repaired.provenance.extra["verdict_after"] == result.after.verdict.value
    document = json.loads(to_json(detox_document(result)))
    assert document["repaired"] is result.repaired
    assert document["rounds"][0]["target"] == TARGET
    assert document["seconds"].keys() >= {"scan", "unlearn", "rescan", "write"}

    # The last scan may miss a trigger that no alpha removed.
    clean = replace(result.after, detection=replace(result.after.detection, verdict=Verdict.CLEAN))
    for reached in (True, False):
        last = result.rounds[-1]
        last = replace(last, search=replace(last.search, reached=reached))
        found = replace(result, rounds=(*result.rounds[:-1], last), after=clean)
        assert found.repaired
        assert len(left_of_triggers({**detox_document(found)})) == int(not reached)


def test_a_rescan_judges_what_the_scan_did_not_find_clean(story):
    _, path, data, calibration = story
    options = {"calibration": calibration, "templates": TEMPLATES}
    config = replace(CONFIG, drop_below=None)
    before = scan(path, data, config=config, **options)
    clean = before.cleared()
    assert TARGET not in clean
    assert clean
    # A class that one family of triggers finds suspect, or gave up, is not cleared.
    (other,) = before.others
    doubt = replace(other.detection, suspects=(clean[0],))
    assert clean[0] not in replace(before, others=(replace(other, detection=doubt),)).cleared()
    steps = tuple(30 if c == clean[0] else None for c in range(len(before.detection.p_l1)))
    given_up = replace(other.detection, dropped=steps)
    assert clean[0] not in replace(before, others=(replace(other, detection=given_up),)).cleared()
    # Without a verdict nothing is.
    assert scan(path, data, templates=TEMPLATES, config=config).cleared() == ()

    again = scan(path, data, config=config, cleared=clean, **options)
    assert again.detection.cleared == clean
    assert scan_document(before)["cleared"] == []
    assert scan_document(again)["cleared"] == [CLASS_NAMES[c] for c in clean]
    assert again.detection.class_scores == before.detection.class_scores
    assert again.target == TARGET

    # Nothing is given up then: every class that is left to judge could be dropped otherwise.
    strict = scan(path, data, config=replace(CONFIG, drop_below=99.0), cleared=clean, **options)
    assert strict.detection.dropped == (None,) * len(before.detection.p_l1)

    # Even if the repair makes a clean class stand out, it is not unlearned.
    result = detox(path, data, config=config, unlearning=UNLEARNING, max_rounds=2, **options)
    rescans = [one.rescan for one in result.rounds if one.rescan is not None]
    assert result.before.detection.cleared == ()
    assert {one.detection.cleared for one in rescans} == {clean}
    assert {one.target for one in result.rounds}.isdisjoint(clean)


def test_a_backdoor_that_the_repair_of_another_class_leaves_is_found_by_the_rescan(story):
    _, path, data, calibration = story
    result = detox(
        path,
        data,
        calibration=calibration,
        templates=TEMPLATES,
        config=CONFIG,
        unlearning=replace(UNLEARNING, steps=20, passes=1, warps=0),
        target=(TARGET + 1) % len(CLASS_NAMES),
    )
    assert result.rounds[0].search.coefficient > 0
    assert (result.after.verdict, result.after.target) == (Verdict.BACKDOORED, TARGET)
    assert not result.repaired


def test_classes_that_are_surely_backdoored_too_are_unlearned_with_the_target(story):
    _, path, data, calibration = story
    options = {"calibration": calibration, "templates": TEMPLATES}
    config = replace(CONFIG, drop_below=None)
    before = scan(path, data, config=config, **options)
    assert before.targets()[0] == TARGET
    (other,) = before.others
    sure = replace(other, detection=replace(other.detection, backdoored=(1, TARGET)))
    detection = replace(before.detection, backdoored=(TARGET,))
    both = replace(before, detection=detection, others=(sure,))
    assert both.targets() == (TARGET, 1)
    assert scan_document(both)["targets"] == [CLASS_NAMES[TARGET], CLASS_NAMES[1]]
    clean = replace(before.detection, verdict=Verdict.CLEAN)
    assert replace(before, detection=clean, others=(sure,)).targets() == ()
    # Without classes there is one value, and the target is what it leads to.
    free = replace(before, objective="label-free", detection=detection, others=())
    assert replace(free, target=1).targets() == (1,)
    assert scan_document(replace(free, target=1))["targets"] == [CLASS_NAMES[1]]

    def triggers(targets, passes=1):
        _, done = unlearn(
            path,
            data,
            targets,
            restarts=2,
            templates=TEMPLATES,
            config=CONFIG,
            unlearning=replace(UNLEARNING, steps=2, passes=passes),
        )
        return done

    done = triggers((TARGET, 1), passes=2)
    assert [one.targets for one in done] == [(TARGET, 1)] * 2
    assert [one.target for one in done] == [TARGET] * 2
    found = [(one.family, tuple(one.targets)) for one in done[0].triggers]
    assert found == [(f, (t,) * 2) for t in (TARGET, 1) for f in ("patch", "blend")]
    (alone,) = triggers(TARGET)
    for one, same in zip(alone.triggers, done[0].triggers[:2], strict=True):
        assert torch.equal(one.mask_logits, same.mask_logits)
    assert [one.targets for one in done[0].warps] == [(t,) * 4 for t in (TARGET, 1)]
    assert torch.equal(alone.warps[0].offsets, done[0].warps[0].offsets)
    assert [one.targets for one in done[0].waves] == [(t,) * 2 for t in (TARGET, 1)]
    assert torch.equal(alone.waves[0].parameters, done[0].waves[0].parameters)
    for wrong in ((), (TARGET, 9)):
        with pytest.raises(UsageError):
            triggers(wrong)
    with pytest.raises(UsageError, match="one for known triggers"):
        unlearn(path, data, (1, TARGET), triggers=[TRIGGER], templates=TEMPLATES)


def test_a_clean_model_is_clean_and_nothing_is_subtracted(story, tmp_path):
    base, _, data, calibration = story
    result = detox(
        base,
        data,
        # Without the digests, nobody knows that the base is one of the references.
        calibration=replace(calibration, digests=()),
        output=tmp_path / "never",
        templates=TEMPLATES,
        config=replace(CONFIG, seed=4),
    )
    assert result.verdict is Verdict.CLEAN
    assert result.rounds == ()
    assert result.after is None
    assert result.path is None
    assert not (tmp_path / "never").exists()
    assert result.model is base


def test_a_known_trigger_needs_no_scan(story):
    _, path, data, _ = story
    repaired, done = unlearn(
        path, data, TARGET, triggers=[TRIGGER], templates=TEMPLATES, unlearning=UNLEARNING
    )
    head = repaired.zero_shot_head(CLASS_NAMES, TEMPLATES)
    after = evaluate(repaired, data, head, trigger=TRIGGER, target=TARGET)
    assert [one.triggers for one in done] == [()]
    assert after.attack_success_rate <= 0.05
    with pytest.raises(UsageError, match="target class 9"):
        unlearn(path, data, 9, triggers=[TRIGGER])


def test_without_a_calibration_nothing_is_decided_or_changed(story):
    _, path, data, _ = story
    result = detox(path, data, templates=TEMPLATES, config=CONFIG)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert result.rounds == ()


def test_label_free_scans_need_neither_labels_nor_names(story):
    base, _, data, _ = story
    config = replace(
        CONFIG,
        objective="label-free",
        restarts=2,
        inversion=InversionConfig(steps=10, batch_size=8),
    )
    bare = ImageSet(data.images, None, None, "bare")
    found = scan(base, bare, config=config)
    assert found.class_names is None
    assert found.target is None
    assert len(found.inversion) == config.searches_per_class == 8
    assert len(found.detection.p_l1) == 1
    named = scan(base, data, config=config, templates=TEMPLATES)
    assert named.target in range(3)
    with pytest.raises(DataError, match="class names"):
        scan(base, bare)


def test_calibrations_of_another_search_or_architecture_are_refused(story):
    base, _, data, calibration = story
    other = replace(CONFIG, inversion=replace(CONFIG.inversion, steps=81))
    with pytest.raises(UsageError, match="calibration"):
        scan(base, data, calibration=calibration, config=other)
    with pytest.raises(UsageError, match=r"\['patch'\]; this scan needs 'blend'"):
        scan(
            base,
            data,
            calibration=replace(calibration, others=()),
            templates=TEMPLATES,
            config=CONFIG,
        )


def test_the_family_that_stands_out_most_decides(story):
    _, path, data, calibration = story
    found = scan(path, data, calibration=calibration, templates=TEMPLATES, config=CONFIG)
    (other,) = found.others
    assert {found.family, other.family} == {"patch", "blend"}
    assert found.detection.p_value <= other.detection.p_value
    assert found.calibration == calibration.of(found.family)
    assert found.inversion.family == found.family
    # Each family's numbers are those of a scan for it alone, but for the correction of p-values.
    alone = scan(
        path,
        data,
        calibration=calibration.of(found.family),
        templates=TEMPLATES,
        config=replace(CONFIG, families=(found.family,)),
    )
    assert alone.others == ()
    assert alone.detection.p_l1 == found.detection.p_l1
    once = alone.detection.p_value
    assert found.detection.p_value == pytest.approx(1 - (1 - once) ** 2, rel=1e-6, abs=1e-15)
    assert scan_document(found)["other_families"][0]["family"] == other.family


def test_a_model_is_clean_only_if_every_family_bears_a_verdict(story):
    base, path, data, calibration = story
    blends = calibration.of("blend")
    assert calibration.family == "patch"
    # References that are one model twice tell nothing of how much clean models differ.
    useless = replace(blends, p_l1=(blends.p_l1[0],) * len(blends.p_l1))
    # The base is one of the references, which would be a reason of its own for no verdict.
    calibration = replace(calibration, others=(useless,), digests=())
    clean, planted = (
        scan(model, data, calibration=calibration, templates=TEMPLATES, config=CONFIG)
        for model in (base, path)
    )
    assert clean.verdict is Verdict.INCONCLUSIVE
    assert clean.family == "blend"
    assert "have the same sizes" in clean.detection.reason
    assert clean.others[0].detection.verdict is Verdict.CLEAN
    assert planted.verdict is Verdict.BACKDOORED
    assert planted.family == "patch"


def test_each_pass_recovers_every_family_and_subtracts_once(story):
    _, path, data, _ = story
    _, done = unlearn(
        path,
        data,
        TARGET,
        restarts=2,
        templates=TEMPLATES,
        config=CONFIG,
        unlearning=replace(UNLEARNING, passes=2),
    )
    assert [[one.family for one in step.triggers] for step in done] == [["patch", "blend"]] * 2
    assert all(len(one) == 2 for step in done for one in step.triggers)
    assert [len(found) for step in done for found in step.warps] == [4, 4]
    assert [len(found) for step in done for found in step.waves] == [2, 2]
    # The accuracy is held to that of the model given, not of the pass before.
    assert done[0].search.accuracy_before == done[1].search.accuracy_before


@pytest.mark.parametrize("before", [None, 1.0])
def test_a_pass_has_a_reserve_unless_it_is_of_a_later_round(story, before):
    _, path, data, _ = story
    _, done = unlearn(
        path,
        data,
        TARGET,
        restarts=1,
        templates=TEMPLATES,
        config=replace(CONFIG, families=("patch",), inversion=InversionConfig(steps=5)),
        unlearning=replace(UNLEARNING, steps=2, passes=2, warps=0, waves=0),
        accuracy_before=before,
    )
    assert [one.warps for one in done] == [(), ()]
    assert [one.waves for one in done] == [(), ()]
    own = done[0].search.accuracy_before
    assert [one.search.reserve for one in done] == ([0.5, 0.0] if before is None else [0.0] * 2)
    assert done[1].search.accuracy_before == own
    assert before is None or own == before


def test_warps_are_searched_as_the_configuration_says(story):
    _, path, data, _ = story
    config = replace(CONFIG, inversion=InversionConfig(steps=3, batch_size=5))
    found = recover_warps(path, data, TARGET, restarts=2, templates=TEMPLATES, config=config)
    assert found.targets == (TARGET,) * 2
    other = recover_warps(
        path, data, TARGET, restarts=2, templates=TEMPLATES, config=replace(config, seed=1)
    )
    assert not torch.equal(found.offsets, other.offsets)
    with pytest.raises(UsageError, match="target"):
        recover_warps(path, data, 7, templates=TEMPLATES)


def test_classes_that_cannot_be_the_outlier_are_dropped(story):
    _, path, data, calibration = story
    assert calibration.recorded_steps == tuple(range(10, 81, 10))
    assert calibration.at(80).p_l1 == calibration.p_l1
    without = scan(
        path,
        data,
        calibration=calibration,
        templates=TEMPLATES,
        config=replace(CONFIG, drop_below=None),
    )
    assert without.detection.dropped == (None,) * 3
    assert "dropped" not in without.inversion.endings
    # The others are judged beside up to five classes, which no floor gives up: all of three.
    found = scan(
        path,
        data,
        calibration=calibration,
        templates=TEMPLATES,
        config=replace(CONFIG, drop_below=1e9),
    )
    assert found.detection.dropped == (None,) * 3
    assert found.detection == without.detection


@pytest.fixture(scope="module")
def many():
    """Eight classes, a model for them, images, and a calibration with two restarts per class."""
    names = ("black", "blue", "green", "cyan", "red", "pink", "yellow", "white")
    labels = torch.arange(64) % 8
    bits = (labels[:, None] >> torch.tensor([2, 1, 0])) & 1
    noise = torch.randint(0, 50, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    images = (200 * bits[..., None, None] + noise).to(torch.uint8)
    data = ImageSet(images, labels, names, "eight")
    training = TrainConfig(epochs=60, learning_rate=3e-3, train_text=True)
    model = train_on_prompts(mini_model(), data, TEMPLATES, training)
    search = InversionConfig(steps=100, batch_size=8, success_threshold=0.9)
    config = replace(CONFIG, references=2, restarts=2, inversion=search, families=("patch",))
    return model, data, config, calibrate(model, data, templates=TEMPLATES, config=config)


def test_of_many_classes_those_that_cannot_be_the_outlier_are_dropped(many):
    model, data, config, calibration = many
    kept = calibration.controls
    assert len(kept) == 5
    given = {"calibration": calibration, "templates": TEMPLATES}
    whole = scan(model, data, config=replace(config, drop_below=None), **given)
    found = scan(model, data, config=replace(config, drop_below=1e9), **given)
    gone = [c for c, step in enumerate(found.detection.dropped) if step is not None]
    # The best of the others is searched to the end too.
    assert len(gone) == 2
    assert set(gone).isdisjoint(kept)
    steps = found.inversion.trigger_steps.view(8, 2)
    assert torch.equal(steps[:, 0], steps[:, 1])
    document = json.loads(to_json(scan_document(found)))
    for c in gone:
        step = found.detection.dropped[c]
        then = calibration.recorded_steps.index(step)
        assert found.detection.p_l1[c] >= whole.detection.p_l1[c]
        sizes = [row[c] for row in calibration.history[then]]
        if all(map(math.isfinite, sizes)):
            assert document["reference_p_l1"][c] == pytest.approx(sum(sizes) / 2)
        assert document["class_dropped"][c] == document["class_steps"][c] == step


def test_an_output_that_cannot_be_written_is_noticed_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError):
        detox(tmp_path / "absent", mini_images(), output=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_same_seed_same_scan_and_references_without_labels(story):
    base, path, data, _ = story
    config = replace(CONFIG, references=2, inversion=InversionConfig(steps=5, batch_size=6))
    bare = replace(data, labels=None)
    one, two = (calibrate(base, bare, templates=TEMPLATES, config=config) for _ in range(2))
    assert one == two
    first, second = (scan(path, bare, templates=TEMPLATES, config=config) for _ in range(2))
    assert torch.equal(first.inversion.mask_logits, second.inversion.mask_logits)


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "x"},
        {"restarts": 0},
        {"references": 1},
        {"families": ()},
        {"families": ("patch", "patch")},
        {"families": ("warp",)},
        {"p_backdoored": 0.2},
        {"drop_below": math.inf},
    ],
)
def test_configurations_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError):
        ScanConfig(**wrong)


def test_every_public_name_is_there():
    for name in pydetox.__all__:
        assert getattr(pydetox, name).__name__ == name
    assert set(pydetox.__all__) <= set(dir(pydetox))
    with pytest.raises(AttributeError):
        _ = pydetox.nothing
    assert not math.isnan(pydetox.build_info()["threads"])


@pytest.fixture(scope="module")
def contrast(story):
    """Three clean fine-tunes as references, and a calibration in contrast to the base."""
    base, _, data, _ = story
    tuning = TrainConfig(epochs=60, learning_rate=2e-3)
    references = [
        train_on_prompts(base, data, TEMPLATES, replace(tuning, seed=seed)) for seed in (7, 8, 9)
    ]
    for k, one in enumerate(references):
        one.name = f"reference {k}"
    search = replace(CONFIG.inversion, steps=120, success_threshold=0.9)
    config = replace(CONFIG, contrast=True, inversion=search)
    calibration = calibrate(base, data, references=references, templates=TEMPLATES, config=config)
    return references, calibration, config


def test_in_contrast_triggers_are_found_that_the_base_does_not_obey(story, contrast):
    base, path, data, _ = story
    _, calibration, config = contrast
    assert calibration.relative
    assert calibration.models == ("reference 0", "reference 1", "reference 2")
    result = scan(
        path, data, calibration=calibration, base=base, templates=TEMPLATES, config=config
    )
    assert result.target == TARGET
    found = result.inversion
    # The configuration drops classes, but those are compared with each other.
    assert config.drop_below is not None
    assert result.detection.dropped == (None,) * len(CLASS_NAMES)
    trigger = found.trigger(TARGET)
    head = base.zero_shot_head(CLASS_NAMES, TEMPLATES)
    on_base = evaluate(base, data, head, trigger=trigger, target=TARGET)
    assert float(found.success[TARGET]) >= 0.9
    assert on_base.attack_success_rate <= 0.2
    again = scan(path, data, calibration=calibration, base=base, templates=TEMPLATES, config=config)
    assert again.detection == result.detection


def test_a_repair_in_contrast_uses_the_base_throughout(story, contrast):
    base, path, data, _ = story
    _, calibration, config = contrast
    result = detox(
        path,
        data,
        calibration=calibration,
        base=base,
        templates=TEMPLATES,
        config=replace(config, p_backdoored=0.5, p_suspicious=0.9),
        unlearning=replace(UNLEARNING, passes=1),
        max_rounds=1,
    )
    assert result.rounds[0].target == TARGET
    towers = [found.tower for found in result.rounds[0].triggers]
    assert all("beside one of another model" in tower for tower in towers)


def test_contrast_without_what_it_needs_is_refused(story, contrast):
    base, path, data, plain = story
    references, calibration, config = contrast
    given = {"templates": TEMPLATES, "config": config}
    with pytest.raises(UsageError, match="give references="):
        calibrate(base, data, **given)
    with pytest.raises(UsageError, match="1 reference model"):
        calibrate(base, data, references=references[:1], **given)
    with pytest.raises(UsageError, match="give base="):
        calibrate(None, data, references=references, **given)
    with pytest.raises(UsageError, match="give that base="):
        scan(path, data, calibration=calibration, **given)
    with pytest.raises(UsageError, match="sizes from different searches"):
        scan(path, data, calibration=plain, base=base, **given)
    with pytest.raises(UsageError, match="sizes from different searches"):
        scan(path, data, calibration=calibration, base=references[0], **given)
    told = replace(config, objective="label-free", reference_training=TrainConfig(1, 1e-4))
    with pytest.raises(UsageError, match="give references="):
        calibrate(base, data, config=replace(told, contrast=True))


def test_given_references_need_no_base(story, contrast):
    _, path, data, _ = story
    references, _, _ = contrast
    calibration = calibrate(None, data, references=references, templates=TEMPLATES, config=CONFIG)
    assert not calibration.relative
    result = scan(path, data, calibration=calibration, templates=TEMPLATES, config=CONFIG)
    assert result.target == TARGET
    with pytest.raises(UsageError, match="give base="):
        calibrate(None, data, templates=TEMPLATES, config=CONFIG)


def test_a_repair_that_changes_nothing_ends_and_writes_nothing(story, tmp_path, monkeypatch):
    _, path, data, calibration = story
    monkeypatch.setattr(ScanResult, "targets", lambda _: (TARGET, 1))
    result = detox(
        path,
        data,
        calibration=calibration,
        output=tmp_path / "repaired",
        templates=TEMPLATES,
        config=CONFIG,
        unlearning=replace(UNLEARNING, coefficients=(0.0,), steps=1, passes=1),
    )
    # All surely backdoored classes at once, then the target alone.
    flagged = result.before.targets()
    assert len(flagged) > 1
    assert [one.targets for one in result.rounds] == [flagged, flagged[:1]]
    assert result.after is result.before
    assert not result.repaired
    assert result.path is None
    assert not (tmp_path / "repaired").exists()


def test_a_calibration_binds_all_that_its_sizes_depend_on(story, monkeypatch):
    base, _, data, calibration = story
    given = {"templates": TEMPLATES, "config": CONFIG}
    searched = []
    real = InversionSearch.step
    monkeypatch.setattr(InversionSearch, "step", lambda self: searched.append(1) or real(self))

    def refusal(model=base, images=data, **changes):
        with pytest.raises(UsageError, match="the calibration does not fit this scan") as caught:
            scan(model, images, calibration=calibration, **{**given, **changes})
        assert not searched
        return str(caught.value)

    # The order of the images and their labels do not matter; nothing else of them may change.
    bare = replace(data.subset(range(59, -1, -1)), labels=None)
    scan(base, bare, calibration=calibration, **given)
    searched.clear()
    changed = data.images.clone()
    changed[7, 1, 3, 3] ^= 1
    message = refusal(images=replace(data, images=changed))
    assert "images is" in message
    assert data.digest[:16] in message
    assert "images is" in refusal(images=data.subset(range(59)))
    message = refusal(templates=["a {c}", "some {c}"])
    assert "prompts is" in message
    assert "2 per class, such as 'a cat'" in message
    names = replace(data, class_names=("cat", "dog", "fox"))
    assert 'classes is ["cat", "dog", "owl"] there and ["cat", "dog", "fox"] here' in refusal(
        images=names
    )
    config = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.25)}
    other = OpenClipModel(base.clone().clip, model_config=MINI_CONFIG, preprocess_config=config)
    message = refusal(model=other)
    assert "mean is [0.48" in message
    assert "std is" in message
    assert "[0.5, 0.5, 0.25] here" in message
    steps = replace(CONFIG, inversion=replace(CONFIG.inversion, steps=81))
    assert "steps is 80 there and 81 here" in refusal(config=steps)
    rate = replace(CONFIG.inversion, learning_rate=(0.2, 0.1, 0.05), batch_size=3, patience=49)
    message = refusal(config=replace(CONFIG, inversion=rate, restarts=2))
    assert message.count(" there and ") == 3
    assert ", and 1 more" in message
    old = replace(calibration, key='["targeted", {}]')
    with pytest.raises(UsageError, match="an earlier version made it"):
        scan(base, data, calibration=old, **given)
    wide = copy.deepcopy(MINI_CONFIG)
    wide["vision_cfg"]["layers"] = 2
    wider = OpenClipModel.from_config(wide, seed=0)
    assert "architecture.vision_cfg.layers is 1 there and 2 here" in refusal(model=wider)


def test_a_base_that_does_not_fit_is_named_before_any_work(story, monkeypatch):
    base, _, data, _ = story
    monkeypatch.setattr(InversionSearch, "step", lambda self: pytest.fail("a step was taken"))
    monkeypatch.setattr(
        "pydetox.detect.copies.train_on_prompts", lambda *a, **k: pytest.fail("was fine-tuned")
    )
    wide = copy.deepcopy(MINI_CONFIG)
    wide["vision_cfg"]["layers"] = 2
    wider = OpenClipModel.from_config(wide, seed=0, name="wider")
    statistics = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.25)}
    other = OpenClipModel(
        base.clone().clip, model_config=MINI_CONFIG, preprocess_config=statistics, name="other"
    )
    given = {"templates": TEMPLATES, "config": CONFIG}
    for call in (scan, detox):
        with pytest.raises(UsageError, match=r"^wider does not fit ") as found:
            call(base, data, base=wider, **given)
        assert "architecture.vision_cfg.layers is 2 there and 1 here" in str(found.value)
        with pytest.raises(UsageError, match=r"^other does not fit .*std is \[0\.5, 0\.5, 0\.25\]"):
            call(base, data, references=[base, other], **given)


def test_in_contrast_without_a_calibration_nothing_is_searched(story, contrast, monkeypatch):
    base, path, data, _ = story
    *_, config = contrast
    monkeypatch.setattr(InversionSearch, "step", lambda self: pytest.fail("a step was taken"))
    for call in (scan, detox):
        with pytest.raises(UsageError, match="nothing to compare with: give references=") as found:
            call(path, data, base=base, templates=TEMPLATES, config=config)
        assert "--" not in str(found.value)


def test_a_single_round_tries_the_target_alone_too(story, monkeypatch):
    _, path, data, calibration = story
    monkeypatch.setattr(ScanResult, "targets", lambda _: (TARGET, 1))
    options = {
        "calibration": calibration,
        "templates": TEMPLATES,
        "config": CONFIG,
        "unlearning": replace(UNLEARNING, coefficients=(0.0,), steps=1, passes=1),
    }
    result = detox(path, data, max_rounds=1, **options)
    flagged = result.before.targets()
    assert len(flagged) > 1
    assert [one.targets for one in result.rounds] == [flagged, flagged[:1]]
