"""The loop: epochs, steps, evaluation, checkpoints; killed anywhere it goes on, to the same last bit on a CPU."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from attar.data import Sample
from attar.data.hashing import hash_counters
from attar.errors import AttarError
from attar.method import Terms
from attar.spec import TrainSpec
from attar.train.distributed import join
from attar.train.finish import finish
from attar.train.precision import autocast
from attar.train.run import Run
from attar.train.run_folder import RunFolder, environment
from attar.train.stopping import Interrupted, StopRequest
from attar.train.tracking import Tracker

__all__ = ["fit", "train_step"]

_RANDOM = 4  # separates a step's random numbers from those of order and augmentation under the same seed


def fit(
    spec: TrainSpec,
    folder: str | Path,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train what the spec describes into a run folder, going on from where an earlier call was interrupted.

    Under `torchrun` all processes call it alike; only the first one writes.

    Args:
        spec: the run.
        folder: new, empty, or of a run of the same spec. A finished run gives its result at once.
        overwrite: remove what an earlier run left there and begin anew.
        console: where progress is shown; default: the terminal.
        stop_after: stop, saved as by Ctrl-C, after so many steps of this call.

    Returns:
        The content of `result.json`.

    Raises:
        AttarError: anything the user can mend; checkpoints that are there stay.
        Interrupted: Ctrl-C, SIGTERM or `stop_after`; the same call goes on.
    """
    home, console = RunFolder(Path(folder)), console or Console()
    with join() as ranks:
        stored = ranks.on_first(lambda: home.examine(spec, overwrite))
        if stored is not None:
            if ranks.first:
                console.print(f"'{home.path}' is finished: this is its stored result.", markup=False, soft_wrap=True)
            return stored
        run = Run.prepare(spec, ranks)
        about = environment(
            ranks,
            precision=run.precision,
            compiled=run.compiled,
            data=run.source.fingerprint,
            images={name: len(split) for name, split in run.source.splits.items()},
            skipped_images=len(run.source.skipped),
        )
        ranks.on_first(lambda: home.begin(spec, about, overwrite))
        tracker = Tracker(home.path, console, active=ranks.first, total=run.total_steps)
        try:
            run.remember_teachers(home)
            position = run.resume(home)
            ranks.on_first(lambda: tracker.start(run.step, position))
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                _train(run, home, tracker, stop_after)
        except torch.OutOfMemoryError as error:
            raise AttarError(f"The GPU cannot hold a batch of {spec.batch}: choose a smaller batch.") from error
        finally:
            tracker.close()
        return finish(run, home)


def _train(run: Run, home: RunFolder, tracker: Tracker, stop_after: int | None) -> None:
    spec, ranks = run.spec, run.ranks
    stop_at = run.total_steps if stop_after is None else run.step + stop_after
    progress = torch.zeros((), device=ranks.device)
    clock, saved_at = _Clock(run), time.monotonic()
    with StopRequest() as stop:
        for epoch in range(run.step // run.steps_per_epoch, spec.epochs):
            first = run.step % run.steps_per_epoch
            if first == 0:
                run.begin_epoch(epoch)
            run.distiller.train()
            run.plan(epoch, first)
            clock.start()
            batches = cast(Generator[Sample, None, None], run.loader.epoch(epoch, first))
            with closing(batches):
                for sample, seed in zip(batches, _seeds(run), strict=True):
                    fraction = run.step / run.total_steps if spec.progress == "step" else epoch / spec.epochs
                    terms = train_step(run, sample, seed, progress.fill_(fraction))
                    run.meter.add(terms, run.step)
                    run.step += 1
                    tracker.advance()
                    met = run.step % spec.log_every == 0
                    if met:
                        _log(run, tracker, clock, epoch, fraction)
                    # Several processes agree on what to do at the lines of the log only; one may stop at any step.
                    if (met or ranks.world == 1) and run.step % run.steps_per_epoch:
                        due = time.monotonic() - saved_at >= spec.checkpoint_seconds
                        stopping, due = ranks.any([stop.made or run.step >= stop_at, due and ranks.first])
                        if stopping or due:
                            clock.stop()
                            run.save(home, tracker)
                            clock.start()
                            saved_at = time.monotonic()
                        if stopping:
                            raise _interrupted(run, home)
            _end_epoch(run, home, tracker, clock, epoch)
            saved_at = time.monotonic()
            if run.step < run.total_steps and ranks.any([stop.made or run.step >= stop_at])[0]:
                raise _interrupted(run, home)


def train_step(run: Run, sample: Sample, seed: int, progress: Tensor) -> Terms:
    """Take one optimiser step; nothing here waits for the device."""
    # torch.manual_seed would look for devices that are not used, at many times the cost.
    torch.default_generator.manual_seed(seed)
    if run.ranks.device.type == "cuda":
        torch.cuda.manual_seed(seed)
    run.schedule.step_update(run.step)
    batch = run.batch_of(sample)
    try:
        with autocast(run.precision, run.ranks.device):
            if run.remembered is not None:
                run.remembered.fill(batch.images)
            terms: Terms = run.step_module(batch, progress)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise AttarError(
            f"Batch norm cannot train on the {len(sample.images)} image that step {run.step} holds: "
            "leave the last, smaller batch out (keep_last off) or choose another batch."
        ) from error
    terms.total().backward()  # type: ignore[no-untyped-call]
    if run.spec.clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(run.distiller.parameters(), run.spec.clip_grad)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema is not None:
        run.ema.update(run.distiller.student, run.step + 1)
    return terms


def _seeds(run: Run) -> list[int]:
    """Return one seed per step left in the epoch: dropout, drop path and mixing are functions of (seed, step, rank).

    So there is no random state to save, and a resumed run draws what the uninterrupted one would have drawn.
    """
    steps = np.arange(run.step, (run.step // run.steps_per_epoch + 1) * run.steps_per_epoch)
    words = hash_counters(run.spec.seed, _RANDOM, steps, run.ranks.rank)
    return [int(word) for word in words >> np.uint64(1)]


def _log(run: Run, tracker: Tracker, clock: _Clock, epoch: int, progress: float) -> None:
    """Write what happened since the last line; here the host waits for the device."""
    losses = run.meter.window()
    clock.stop()
    line = {
        "step": run.step,
        "epoch": epoch,
        **_phase(run),
        "progress": progress,
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": clock.rate(),
        "losses": losses,
        "weights": run.meter.weights(),
    }
    run.meter.check(run.saved_step)
    run.ranks.on_first(lambda: tracker.step(line))
    clock.start()


def _end_epoch(run: Run, home: RunFolder, tracker: Tracker, clock: _Clock, epoch: int) -> None:
    """Measure on the hold-out, remember the best, save."""
    run.means, run.weights = run.meter.epoch(), run.meter.weights()
    clock.stop()
    run.check()
    measured = {"student": run.evaluate(run.distiller.student, "holdout")}
    if run.ema is not None:
        measured["ema"] = run.evaluate(run.ema.module, "holdout")
    if run.spec.select == "last":
        run.best = {}
    # A phase trains parts of the network, and mostly not the classifier: what the hold-out says of it means nothing.
    for selected, metrics in measured.items() if run.distiller.phase is None else ():
        better = (metrics.score, -metrics.nll) > (run.best.get(metrics.primary, -1.0), -run.best.get("nll", 0.0))
        if better:
            run.best = {"epoch": epoch, "step": run.step, "selected": selected, **metrics.as_dict()}
    line = {
        "step": run.step,
        "epoch": epoch,
        "epochs": run.spec.epochs,
        **_phase(run),
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": run.step * run.batch / max(run.seconds, 1e-9),
        "losses": run.means,
        "weights": run.weights,
        "holdout": measured["student"].as_dict(),
        **({"holdout_ema": measured["ema"].as_dict()} if "ema" in measured else {}),
    }
    run.ranks.on_first(lambda: tracker.epoch(line))
    # The best first: were it last, a crash in between would leave a checkpoint that speaks of a best it has not.
    if run.best.get("step") == run.step:
        run.ranks.on_first(lambda: home.checkpoints.save_best(run.learnt()))
    run.save(home, tracker)


def _phase(run: Run) -> dict[str, str]:
    """What the history calls the phase that the last step belonged to; nothing in the main training."""
    return {"phase": run.distiller.phase.name} if run.distiller.phase is not None else {}


def _interrupted(run: Run, home: RunFolder) -> Interrupted:
    epoch = run.step // run.steps_per_epoch
    return Interrupted(
        f"Stopped and saved after step {run.step} of {run.total_steps} (epoch {epoch + 1} of {run.spec.epochs}) in "
        f"'{home.path}': run the same command again to go on."
    )


class _Clock:
    """Seconds spent in training steps, kept in the run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._since = time.perf_counter()
        self._marked = (run.step, run.seconds)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        now = time.perf_counter()
        self.run.seconds += now - self._since
        self._since = now

    def rate(self) -> float:
        """Return images per second since the last call."""
        steps, seconds = self.run.step - self._marked[0], self.run.seconds - self._marked[1]
        self._marked = (self.run.step, self.run.seconds)
        return steps * self.run.batch / max(seconds, 1e-9)
