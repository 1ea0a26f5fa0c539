"""The search itself: K triggers optimised together against one frozen image tower."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from ..errors import ArchitectureError, UsageError
from ..models import OpenClipModel
from ..ops import BestTriggers, stamp_triggers, stamp_triggers_gradients, trigger_update
from ..progress import Progress
from ..rng import generator
from .configuration import InversionConfig
from .elimination import Elimination
from .graph import MOST_CHUNKS, GraphedStep
from .objectives import Objective
from .result import InversionResult
from .start import starting_point
from .state import Ending, Triggers
from .tower import batching_of, check_images, check_sample, chunks, tower_of


class InversionSearch:
    """The state of K searches, advanced step by step; `invert` is the loop around it.

    Minimises objective + cost * |mask|_1 for K triggers at once (DECREE and Neural Cleanse; see
    `objectives`). The tower is frozen: no weight gets a gradient. A step waits for the device only
    when it records the sizes: every `interval` steps and after the last one. Searches end there,
    because they have converged or because `elimination` drops them; their triggers leave the batch
    and cost nothing any more. On a GPU, most steps are replays of a CUDA graph (see `graph`). The
    trial of the first graph waits, too.

    Triggers do not see each other. What one of them does depends on which others are in the batch
    only as far as the rounding of a matrix product depends on its number of rows.
    """

    def __init__(
        self,
        model: OpenClipModel,
        images: Tensor,
        objective: Objective,
        config: InversionConfig,
        *,
        restarts: int = 1,
        elimination: Elimination | None = None,
        contrast: OpenClipModel | None = None,
        labels: Tensor | None = None,
    ) -> None:
        size = model.image_size
        check_images(model, images)
        count = restarts if objective.targets is None else len(objective.targets)
        if count < 1:
            raise UsageError(f"restarts is {restarts}; expected at least 1")
        if elimination is not None and count % elimination.restarts:
            raise UsageError(
                f"{count} triggers; an elimination of {elimination.restarts} restarts per class "
                "expects a multiple of that"
            )
        self._start = time.perf_counter()
        self._model, self._objective, self._config = model, objective, config
        self._elimination = elimination
        device = model.device
        self._images = images.to(device)
        rng = generator("inversion.check", config.seed)
        chosen = check_sample(labels, len(images), config.advanced.check_images, rng)
        self._checked = chosen.to(device)
        mask, pattern, batches = starting_point(config, count, size, len(images))
        mask, pattern = mask.to(device), pattern.to(device)
        self._triggers = Triggers.start(mask, pattern, config.advanced.schedule)
        self._running = list(range(count))  # the triggers' index, where no device is asked
        self._batch = batches.shape[1]
        self._batches = batches.to(device)
        self._tower = tower_of(model, contrast, config.precision)
        self._batching = batching_of(model, self._tower, config.max_batch, device)
        self._towers = 1 if contrast is None else 2
        self._steps, self._tower_passes = 0, 0
        # What changes from step to step lies on the device, because a graph fixes all else.
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._rates = torch.tensor([config.rate(k) for k in range(config.steps)]).to(device)
        self._graph = GraphedStep(device, enabled=config.advanced.cuda_graph)
        self._make_buffers()
        self._last_loss = self._loss
        # Of all K triggers: the recorded sizes, and the results of those whose search has ended.
        self._history: list[list[float]] = []
        self._sizes = [math.inf] * count
        self._last_progress, self._size_then = [0] * count, [math.inf] * count
        self._endings: list[Ending | None] = [None] * count
        self._mask, self._pattern = torch.empty_like(mask), torch.empty_like(pattern)
        self._final_cost = torch.empty(count, device=device)
        self._final_steps = torch.empty(count, dtype=torch.int64, device=device)

    @property
    def done(self) -> bool:
        """Whether all searches have ended."""
        return len(self._triggers) == 0

    @property
    def loss(self) -> Tensor:
        """float32 [A], the objective's loss of the triggers that took the last step."""
        return self._last_loss

    def step(self) -> None:
        """Take one step. Do not call this when the search is `done`."""
        self._graph.run(self)
        self._last_loss = self._loss  # the next buffer is that of the triggers that go on
        config = self._config
        self._steps += 1
        # Every image goes forward and back, and forward once more where memory is short.
        ways = 2 if self._batch <= self._batching.count else 3
        self._tower_passes += ways * self._towers * len(self._triggers) * self._batch
        if self._steps % config.advanced.interval == 0 or self._steps == config.steps:
            self._record_sizes()

    def take_plainly(self) -> None:
        """Take one step on the device, with fewer images at once if memory runs out."""
        rows = self._rows_of_step()
        self._update(*self._batching.run(lambda at_once: self._gradients(rows, at_once)))

    def take_once(self) -> None:
        """Take one step on the device; an error if memory runs out."""
        self._update(*self._gradients(self._rows_of_step(), self._batching.count))

    def shape(self) -> object:
        """Return everything that decides what a step launches, and on which memory."""
        return len(self._triggers), self._batching.count

    def worth_recording(self) -> bool:
        """Whether a step has so few chunks that its launches count."""
        return len(self._parts(self._batching.count)) <= MOST_CHUNKS

    def state(self) -> list[Tensor]:
        """Return all tensors that a step changes."""
        return [*self._triggers.changing(), *self.gradients(), self._loss, self._rate, self._at]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of the last step: of masks [A, H, W] and patterns [A, 3, H, W]."""
        return [self._mask_gradient, self._pattern_gradient]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the image tower."""
        return self._tower.dtype

    def _rows_of_step(self) -> Tensor:
        """Return the indices of the images of this step, int64 [B]."""
        return self._batches.index_select(0, self._at).flatten()

    def _update(self, loss: Tensor, success: Tensor) -> None:
        """Move the triggers along their gradients, in place. loss, success: float32 [A]."""
        config, now = self._config, self._triggers
        self._loss.copy_(loss)
        if config.family == "blend":
            # All pixels keep the same value if their gradients are equal. This takes the mean and
            # not the sum, because the update adds the cost's gradient to every pixel.
            gradient = self._mask_gradient
            gradient.copy_(gradient.mean(dim=(1, 2), keepdim=True).expand_as(gradient))
        smoothed = 0.7 * now.smoothed + 0.3 * success
        now.smoothed.copy_(torch.where(self._at == 0, success, smoothed))
        trigger_update(
            (now.mask, now.pattern),
            (self._mask_gradient, self._pattern_gradient),
            (now.first_mask, now.first_pattern),
            (now.second_mask, now.second_pattern),
            cost=now.cost,
            learning_rate=self._rate.copy_(
                self._rates.index_select(0, self._at).expand_as(self._rate)
            ),
            steps=now.steps,
            active=self._active,
            betas=config.advanced.betas,
            best=BestTriggers(
                (now.best_mask, now.best_pattern),
                now.smallest,
                now.smoothed >= config.needed_success,
            ),
        )
        now.set_costs(config.advanced.schedule.update(now.costs, success >= config.needed_success))
        self._at += 1

    def result(self) -> InversionResult:
        """Check the best triggers on more images and return them.

        Raises ArchitectureError if the model's embeddings are not finite, and UsageError if the
        search is not done.
        """
        if not self.done:
            raise UsageError(f"step {self._steps}; the search is not done")
        count = len(self._mask)
        self._graph.release()
        success = self._batching.run(self._check)
        endings = tuple(ending for ending in self._endings if ending is not None)
        assert len(endings) == count
        recorded_steps = self._config.recorded_steps
        # Where all searches have ended before the last step, nothing changes any more.
        history = self._history + [self._sizes] * (len(recorded_steps) - len(self._history))
        return InversionResult(
            mask_logits=self._mask,
            pattern_logits=self._pattern,
            p_l1=torch.tensor(self._sizes, dtype=torch.float64),
            success=success.cpu(),
            targets=self._objective.targets,
            cost=self._final_cost.cpu(),
            trigger_steps=self._final_steps.cpu(),
            endings=endings,
            recorded_steps=recorded_steps,
            history=torch.tensor(history, dtype=torch.float64),
            steps=self._steps,
            seconds=time.perf_counter() - self._start,
            tower=self._how(),
            tower_passes=self._tower_passes,
            max_batch=self._batching.count,
            family=self._config.family,
        )

    def _how(self) -> str:
        """Return how towers were run, for a report."""
        how = f"{self._tower.description}, {self._batching.describe()}"
        if self._graph.description:
            how = f"{how}; {self._graph.description}"
        on_gpu = self._model.device.type == "cuda"
        return f"{how}; training and prediction in TF32" if on_gpu else how

    def _check(self, at_once: int) -> Tensor:
        """Return the success [K] of the final triggers on the images of the check."""
        count, device = len(self._mask), self._mask.device
        check = self._images[self._checked]
        self._tower_passes += self._towers * count * len(check)
        success = []
        for chunk in chunks(count, max(1, at_once // len(check))):
            embeddings = self._embed(check, self._mask[chunk], self._pattern[chunk], at_once)
            if not bool(torch.isfinite(embeddings).all()):
                raise ArchitectureError(
                    f"{self._model.name}: its embeddings are not finite; "
                    "expected weights without NaN"
                )
            which = torch.arange(count, device=device)[chunk]
            success.append(self._objective(embeddings, which, self._checked)[1])
        return torch.cat(success)

    def _record_sizes(self) -> None:
        """Note the sizes, decide whose search ends here, and take those out of the batch."""
        config, now, step = self._config, self._triggers, self._steps
        area = self._model.image_size**2
        # The one place that waits for the device.
        sizes, balanced = torch.stack([now.smallest / area, now.balanced.double()]).tolist()
        running = self._running
        for k, size in zip(running, sizes, strict=True):
            self._sizes[k] = size
            if size < (1 - config.advanced.least_progress) * self._size_then[k]:
                self._last_progress[k], self._size_then[k] = step, size
        self._history.append(list(self._sizes))
        if self._elimination is not None and step < config.steps:
            contenders = [ending != "dropped" for ending in self._endings]
            for k, out in enumerate(self._elimination.drop(step, self._sizes, contenders)):
                if out and self._endings[k] is None:
                    self._endings[k] = "dropped"
        for k, pressed in zip(running, balanced, strict=True):
            stalled = step - self._last_progress[k] >= config.patience
            if self._endings[k] is not None:
                continue
            if step == config.steps:
                self._endings[k] = "all steps"
            elif pressed and stalled and math.isfinite(self._sizes[k]):
                self._endings[k] = "converged"
        ended = [row for row, k in enumerate(running) if self._endings[k] is not None]
        if not ended:
            return
        device = now.index.device
        left = now.select(torch.tensor(ended, device=device))
        self._mask[left.index], self._pattern[left.index] = left.final_logits()
        self._final_cost[left.index] = left.cost
        self._final_steps[left.index] = left.steps
        kept = [row for row, k in enumerate(running) if self._endings[k] is None]
        self._running = [running[row] for row in kept]
        self._triggers = now.select(torch.tensor(kept, dtype=torch.int64, device=device))
        self._make_buffers()

    def _make_buffers(self) -> None:
        """Allocate what every step writes anew, for the triggers that are left.

        A search of a thousand steps does it once, and again when searches end.
        """
        now = self._triggers
        device = now.mask.device
        self._mask_gradient = torch.empty_like(now.mask)
        self._pattern_gradient = torch.empty_like(now.pattern)
        self._loss = torch.empty(len(now), device=device)
        self._rate = torch.empty(len(now), device=device)
        self._active = torch.ones(len(now), dtype=torch.bool, device=device)
        self._rows = torch.empty(0, device=device)

    def _stamp(self, images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
        """Return the tower's input [K * B, ...] for every trigger on every image.

        It lies in a buffer that the next call overwrites.
        """
        tower, size = self._tower, self._model.image_size
        count, patch = len(mask) * len(images), tower.patch_size
        shape = (3, size, size) if patch is None else ((size // patch) ** 2, 3 * patch * patch)
        if len(self._rows) < count:
            self._rows = self._rows.new_empty(0)  # given back before more is asked for
            self._rows = images.new_empty((count, *shape), dtype=tower.dtype)
        rows = self._rows[:count]
        model = self._model
        stamp_triggers(
            images,
            mask,
            pattern,
            mean=model.mean,
            std=model.std,
            patch_size=patch,
            out=rows.view(len(mask), len(images), *rows.shape[1:]),
        )
        return rows

    def _embed(self, images: Tensor, mask: Tensor, pattern: Tensor, at_once: int) -> Tensor:
        """Return embeddings [K, B, D] of every trigger on every image, without gradients."""
        with torch.no_grad():
            parts = [
                self._tower(self._stamp(part, mask, pattern)).view(len(mask), len(part), -1)
                for part in torch.split(images, max(1, at_once // len(mask)))
            ]
            return torch.cat(parts, dim=1)

    def _pull(
        self,
        images: Tensor,
        mask: Tensor,
        pattern: Tensor,
        rows_gradient: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of both logits, given that of the stamped images."""
        return stamp_triggers_gradients(
            rows_gradient.view(len(mask), len(images), *rows_gradient.shape[1:]),
            images,
            mask,
            pattern,
            mean=self._model.mean,
            std=self._model.std,
            patch_size=self._tower.patch_size,
            out=out,
        )

    def _gradients(self, index: Tensor, at_once: int) -> tuple[Tensor, Tensor]:
        """Write the objective's gradients for all triggers; return their loss and success [A].

        index: int64 [B], the images of the step. at_once: Images that go through the tower at once.
        """
        if len(self._rows) > max(at_once, self._batch):
            self._rows = self._rows.new_empty(0)  # from before memory ran out
        parts = self._parts(at_once)
        images = self._images.index_select(0, index)
        found = [self._differentiate(images, index, part, at_once) for part in parts]
        return torch.cat([loss for loss, _ in found]), torch.cat([success for _, success in found])

    def _parts(self, at_once: int) -> list[slice]:
        """Return the chunks of triggers that go through the tower together."""
        return chunks(len(self._triggers), max(1, at_once // self._batch))

    def _differentiate(
        self, images: Tensor, index: Tensor, chunk: slice, at_once: int
    ) -> tuple[Tensor, Tensor]:
        """Write the objective's gradients for a chunk of the triggers; return loss and success.

        Triggers do not see each other, so a chunk's activations are freed before the next one
        starts: the memory of a step does not grow with the number of triggers.
        """
        now = self._triggers
        mask, pattern, which = now.mask[chunk], now.pattern[chunk], now.index[chunk]
        gradients = self._mask_gradient[chunk], self._pattern_gradient[chunk]
        if len(images) <= at_once:
            rows = self._stamp(images, mask, pattern).requires_grad_()
            embeddings = self._tower(rows).view(len(mask), len(images), -1)
            loss, success = self._objective(embeddings, which, index)
            (rows_gradient,) = torch.autograd.grad(loss.sum(), rows)
            self._pull(images, mask, pattern, rows_gradient, gradients)
            return loss.detach(), success
        # More images than fit: the loss needs all embeddings, so they are computed once without
        # activations, and again, part by part, to carry its gradient back.
        embeddings = self._embed(images, mask, pattern, at_once).requires_grad_()
        loss, success = self._objective(embeddings, which, index)
        (pull,) = torch.autograd.grad(loss.sum(), embeddings)
        for total in gradients:
            total.zero_()
        for part in chunks(len(images), at_once):
            rows = self._stamp(images[part], mask, pattern).requires_grad_()
            again = self._tower(rows).view(len(mask), -1, pull.shape[-1])
            (rows_gradient,) = torch.autograd.grad(again, rows, pull[:, part])
            parts = self._pull(images[part], mask, pattern, rows_gradient)
            for total, one in zip(gradients, parts, strict=True):
                total += one
        return loss.detach(), success


def invert(
    model: OpenClipModel,
    images: Tensor,
    objective: Objective,
    config: InversionConfig | None = None,
    *,
    restarts: int = 1,
    elimination: Elimination | None = None,
    contrast: OpenClipModel | None = None,
    labels: Tensor | None = None,
    description: str = "inversion",
) -> InversionResult:
    """Find small triggers that make the objective hold on clean images.

    Args:
        model: The model. Its weights are not changed.
        images: uint8 [N, 3, H, W] of the model's size, at least two.
        objective: What the triggers must do. If it has targets, K is their number.
        config: How to search; default: InversionConfig().
        restarts: K for an objective without targets.
        elimination: The rule that drops triggers which can no longer be the outlier; None to keep
            all triggers.
        contrast: Another model that takes the same inputs, for an objective that needs the
            embeddings of both (`ContrastObjective`).
        labels: int64 [N], the classes of the images. The sample for the check after the search then
            holds them in proportion. They decide nothing else.
        description: A text that is shown with the progress bar.

    Raises:
        DataError: The images have another dtype or size, or there are fewer than two.
        UsageError: There is less than one restart, or the number of triggers is no multiple of
            `elimination.restarts`.
        ArchitectureError: The model's embeddings are not finite, or `contrast` takes other inputs.
    """
    config = config or InversionConfig()
    search = InversionSearch(
        model,
        images,
        objective,
        config,
        restarts=restarts,
        elimination=elimination,
        contrast=contrast,
        labels=labels,
    )
    with Progress(description, config.steps) as progress:
        while not search.done:
            search.step()
            progress.update(1)
    return search.result()
