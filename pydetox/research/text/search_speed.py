"""The CPU time of the search for words and of DBS on the same models, in one run.

Both see the same backdoored model and the same clean texts, and neither has a base. They take
turns: a whole search for all classes, then DBS for one class, until every class had its turn. A
search counts with the median of its times. What DBS is, `dbs` says.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...text.search import TextSearch, search_words
from ..bench.cache import Cache, code_digest, key_of
from .dbs import DbsConfig, DbsTrigger, invert_class, verdict_of
from .verdicts import FULL_VERDICTS, TextVerdictPlan
from .victims import TextVictim, TextWorkshop

_CODE = ("text", "ops", "research/text/dbs.py", "research/text/search_speed.py")


@dataclass(frozen=True)
class SpeedPlan:
    """What is compared.

    Attributes:
        verdicts: How the model is made and searched; the first of its seeds counts, and the number
            of its references.
        attack: The attack on the model.
        dbs: The constants of DBS.
    """

    verdicts: TextVerdictPlan = FULL_VERDICTS
    attack: str = "word"
    dbs: DbsConfig = field(default_factory=DbsConfig)


def compare_searches(
    plan: SpeedPlan,
    *,
    folder: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return "model", "search", "dbs" and "summary", measured or from the cache.

    The summary has scan.search_cpu_seconds and scan.dbs_cpu_seconds, their ratio scan.vs_dbs, and
    scan.vs_dbs_with_references, where the searches of all references count to this one suspect.
    scan.target_right and scan.dbs_target_right are 1 if the class of the smallest loss is the true
    one; scan.dbs_backdoored is 1 if that loss is small enough for a verdict of DBS.
    """
    seed = plan.verdicts.seeds[0]
    shop = TextWorkshop(plan.verdicts.victims, seed, folder=folder)
    victim = TextVictim(seed, plan.attack)
    content = {
        "model": shop.path(victim).name,
        "texts": shop.corpus.defender.digest,
        "scan": plan.verdicts.scan,
        "references": plan.verdicts.references,
        "dbs": plan.dbs,
        "code": code_digest(_CODE),
    }
    cache, key = Cache(shop.folder), key_of("search-speed", content)
    found: dict[str, Any] | None = cache.document(key)
    if found is None:
        found = cache.keep_document(key, _compared(plan, shop, victim, log))
    assert found is not None
    return found


def _compared(
    plan: SpeedPlan, shop: TextWorkshop, victim: TextVictim, log: Callable[[str], None]
) -> dict[str, Any]:
    model, backdoor, texts = shop.model(victim), shop.backdoor(victim), shop.corpus.defender
    assert backdoor is not None
    times, dbs = list[float](), list[DbsTrigger]()
    search: TextSearch | None = None
    for target, name in enumerate(model.class_names):
        start = time.process_time()
        search = search_words(model, texts, plan.verdicts.scan)
        times.append(time.process_time() - start)
        one = invert_class(model, texts, target, plan.dbs)
        dbs.append(one)
        words = model.tokenizer.decode(one.tokens) if one.tokens else "nothing"
        log(
            f"search for all classes {times[-1]:.1f} s; DBS for {name} {one.seconds:.1f} s, loss "
            f"{one.loss:.2g}: {words}"
        )
    assert search is not None
    ours = [min(one.loss for one in row) for row in search.found]
    theirs = [one.loss for one in dbs]
    mine, other = statistics.median(times), sum(one.seconds for one in dbs)
    return {
        "model": victim.name,
        "search": [
            [{"words": one.trigger.text, "loss": one.loss, "success": one.success} for one in row]
            for row in search.found
        ],
        "dbs": [asdict(one) for one in dbs],
        "summary": {
            "scan.search_cpu_seconds": mine,
            "scan.dbs_cpu_seconds": other,
            "scan.vs_dbs": other / mine,
            "scan.vs_dbs_with_references": other / (mine * (1 + plan.verdicts.references)),
            "scan.target_right": int(ours.index(min(ours)) == backdoor.target),
            "scan.dbs_target_right": int(theirs.index(min(theirs)) == backdoor.target),
            "scan.dbs_backdoored": int(verdict_of(dbs, plan.dbs) is not None),
        },
    }
