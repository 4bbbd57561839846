"""One run's state: built the same in every process, saved and restored whole."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from attar.anatomy import Kept
from attar.data import EvalLoader, Loader, Normalization, Sample, Source, augmentation, make_sampler
from attar.distiller import Distiller
from attar.errors import AttarError
from attar.method import Batch
from attar.sampling import ClassPairs
from attar.spec import TrainSpec
from attar.train.build import build_methods, build_model, build_source, build_task
from attar.train.cost import PeakMemory
from attar.train.distributed import Ranks
from attar.train.evaluate import EVAL_BATCH, Metrics, evaluate
from attar.train.memory import keep_freed_memory, memory_format
from attar.train.meter import Meter, advice
from attar.train.precision import resolved
from attar.train.replicas import draw_apart, gathered, of_first, own_part, own_replicas
from attar.train.run_folder import RunFolder
from attar.train.schedule import Schedule, make_optimizer, make_schedule
from attar.train.segmentation import SegmentationMetrics
from attar.train.teacher_cache import TeacherCache, refuse_cache, slots
from attar.train.tracking import Tracker

__all__ = ["Run", "batch_of"]

_COMPILE_REPAYS = 1000  # steps from which on compiling for minutes is worth it on a GPU


@dataclass
class Run:
    """Everything that lives while a run trains.

    Attributes:
        step_module: the distiller, compiled and wrapped for several processes as the spec asks: what a step calls.
        batch: images a step over all processes.
        memory: format of weights and images.
        precision: what the forward pass computes in: `bf16` or `fp32`.
        step: steps done.
        seconds: spent in training steps, evaluation and saving left out.
        best: of the epochs so far, by the hold-out: `epoch`, `step`, `selected` ("student" or "ema"), metrics.
        means: of every term over the last whole epoch.
        weights: of every term in the last step of that epoch.
        saved_step: step of the last checkpoint.
        remembered: what teachers have said, where the spec asks for it.
        apart: every process trains a student of its own; the first one's is measured and kept.
    """

    spec: TrainSpec
    ranks: Ranks
    source: Source
    distiller: Distiller
    step_module: nn.Module
    compiled: bool
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    ema: ModelEmaV3 | None
    loader: Loader
    batch: int
    memory: torch.memory_format
    precision: str
    meter: Meter
    peak_memory: PeakMemory
    step: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    saved_step: int | None = None
    remembered: TeacherCache | None = None
    apart: bool = False

    @classmethod
    def prepare(cls, spec: TrainSpec, ranks: Ranks) -> Run:
        """Build everything that the spec names; nothing is written into the run folder.

        Raises:
            AttarError: the data, the model, a method or an option is refused.
        """
        if ranks.device.type == "cpu":
            keep_freed_memory()
        peak_memory = PeakMemory(ranks.device)
        source = ranks.first_then_others(lambda: build_source(spec))
        # From here to the built distiller everything draws from this seed: the student first, so that runs of one seed
        # start from the same student whatever their methods.
        torch.manual_seed(spec.seed)
        student = build_model(spec, source.num_classes)
        memory = memory_format(student, ranks.device, spec.channels_last)
        student.to(device=ranks.device, memory_format=memory)  # type: ignore[call-overload]
        methods = build_methods(spec, source.num_classes)
        task, normalization = build_task(spec, source.num_classes), Normalization(source.mean, source.std)
        distiller = Distiller(student, methods, task, normalization=(source.mean, source.std), stages=spec.stages)
        distiller.build(torch.randn(2, 3, *source.image_size, device=ranks.device), source.train.index_bound)
        apart = ranks.world > 1 and own_replicas(distiller)
        if apart:
            draw_apart(distiller, spec, ranks)
        memory = memory_format(distiller, ranks.device, spec.channels_last)  # an auxiliary may forbid it too
        distiller.to(device=ranks.device, memory_format=memory)  # type: ignore[call-overload]
        augment = augmentation(spec.augment or source.default_augmentation, spec.task)
        if spec.cache_teachers:
            refuse_cache(distiller, augment, spec.augment_cycle)
        sampler = make_sampler(
            distiller.sampling, source.train.targets, spec.batch, spec.seed, not spec.keep_last, ranks.world
        )
        loader = Loader(
            source.train,
            sampler,
            augment,
            normalization,
            ranks.device,
            rank=ranks.rank,
            world=ranks.world,
            views=distiller.views,
            seed=spec.seed,
            cycle=spec.augment_cycle,
        )
        optimizer = make_optimizer(spec, distiller)
        total_steps = spec.epochs * loader.steps_per_epoch
        repays = ranks.device.type == "cuda" and total_steps >= _COMPILE_REPAYS
        compiled = spec.compile == "on" or (spec.compile == "auto" and repays)
        step_module = _step_module(distiller, ranks, memory, compiled, apart)
        return cls(
            spec,
            ranks,
            source,
            distiller,
            step_module,
            compiled,
            optimizer,
            _schedule(spec, optimizer, distiller, loader.steps_per_epoch),
            ModelEmaV3(student, spec.ema, use_warmup=True) if spec.ema is not None else None,
            loader,
            sampler.batch,
            memory,
            resolved(spec.precision, ranks.device, student),
            Meter(ranks),
            peak_memory,
            apart=apart,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return self.loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.spec.epochs * self.steps_per_epoch

    def begin_epoch(self, epoch: int) -> None:
        """Tell the methods that an epoch begins (0-based); one of them may change the student's widths."""
        self.distiller.epoch_start(epoch, self.spec.epochs)
        if epoch > 0 and self.distiller.wants_holdout:
            # Every process sees all images with the same batch statistics, and finds the same.
            self.ranks.share(self.distiller.buffers())
            self.distiller.see_holdout(_Holdout(self))
        if self.distiller.may_reshape:
            # All processes decide on the same batch statistics.
            self.ranks.share(self.distiller.buffers())
            self._reshape()

    def _reshape(self, kept: Kept | None = None) -> None:
        """Where the student's widths change, train on with what belongs to its new parameters.

        The schedule goes on from where it is; momentum and the moving average begin anew, and so does the search for
        the best epoch, since a student of the original widths is not what is asked for.
        """
        # New auxiliaries are the same in all processes and in a run that goes on.
        torch.manual_seed(self.spec.seed)
        if not self.distiller.reshape(kept):
            return
        device, distiller = self.ranks.device, self.distiller
        self.memory = memory_format(distiller, device, self.spec.channels_last)
        distiller.to(device=device, memory_format=self.memory)  # type: ignore[call-overload]
        if self.ranks.world > 1:
            # What waits for the old parameters' gradients must be gone before the new ones are watched.
            self.step_module = distiller
            gc.collect()
        self.step_module = _step_module(distiller, self.ranks, self.memory, self.compiled, self.apart)
        self.optimizer = make_optimizer(self.spec, distiller)
        self.schedule = _schedule(self.spec, self.optimizer, distiller, self.steps_per_epoch)
        if self.spec.ema is not None:
            self.ema = ModelEmaV3(distiller.student, self.spec.ema, use_warmup=True)
        self.best = {}

    def remember_teachers(self, home: RunFolder) -> None:
        """Where the spec asks for it, let teachers answer once only, and take what the run folder has of that."""
        if not self.spec.cache_teachers:
            return
        augment, source = self.loader.augmentation, self.source
        count = slots(augment, self.spec.augment_cycle)
        assert count is not None
        self.remembered = TeacherCache.open(
            self.distiller,
            home.teacher_logits,
            self.ranks,
            slots=count,
            samples=source.train.index_bound,
            depends_on={
                "data": source.fingerprint,
                "image_size": source.image_size,
                "mean": source.mean,
                "std": source.std,
                "augmentation": repr(augment),
                "seed": self.spec.seed,
                "precision": self.precision,
            },
        )

    def plan(self, epoch: int, first: int) -> None:
        """Get ready for the steps of an epoch from `first` on."""
        if self.remembered is not None:
            numbers = self.loader.numbers(epoch, first)
            if isinstance(self.distiller.sampling, ClassPairs):
                # Teachers are asked about the images, not about their partners behind them.
                numbers = [index[: len(index) // 2] for index in numbers]
            self.remembered.begin(epoch, numbers)

    def batch_of(self, sample: Sample) -> Batch:
        """Return loaded images as the distiller takes them."""
        return batch_of(self.distiller, sample, self.memory)

    def evaluate(self, network: nn.Module, split: str) -> Metrics | SegmentationMetrics:
        """Measure a network of this run; the first process's batch statistics (or whole student) hold for all."""
        with of_first(network, self.ranks, self.apart):
            return evaluate(
                network,
                self.source.splits[split],
                self.loader.normalization,
                self.distiller.task,
                ranks=self.ranks,
            )

    def learnt(self) -> dict[str, Any]:
        """Return what the networks have learnt so far."""
        ema = self.ema.module.state_dict() if self.ema is not None else None
        kept = self.distiller.kept
        return {"step": self.step, "kept": kept, "distiller": self.distiller.state_dict(), "ema": ema}

    def take(self, learnt: dict[str, Any]) -> None:
        """Put back what `learnt` returned of a student of the same widths."""
        self.distiller.load_state_dict(learnt["distiller"])
        if self.ema is not None:
            self.ema.module.load_state_dict(learnt["ema"])

    def check(self) -> None:
        """Refuse numbers that are not finite, before they are saved.

        Raises:
            AttarError: naming the term and step, and the checkpoint that is kept.
        """
        self.meter.check(self.saved_step)
        norms = torch._foreach_norm([parameter.detach() for parameter in self.distiller.parameters()])
        if self.ranks.any([not bool(torch.stack(norms).isfinite().all())])[0]:
            raise AttarError(
                f"The gradient became NaN or infinite by step {self.step} though every term was finite: "
                f"{advice(self.saved_step)}"
            )

    def save(self, home: RunFolder, tracker: Tracker) -> None:
        """Write a checkpoint of this moment, once it is known to be worth going on from."""
        self.check()
        if self.remembered is not None:
            # First: a checkpoint must not know of steps whose answers are lost.
            self.remembered.save(epoch_ends=self.step % self.steps_per_epoch == 0)
        own = {**self.learnt(), "optimizer": self.optimizer.state_dict(), "meter": self.meter.state_dict()}
        state = {
            **own,
            # What every process has of its own: a student, or what it has summed up for the next line of the history.
            "replicas": gathered(own if self.apart else {"meter": own["meter"]}, self.ranks),
            "seconds": self.seconds,
            "best": self.best,
            "means": self.means,
            "weights": self.weights,
            "history": tracker.position,
            "data": self.source.fingerprint,
        }
        self.ranks.on_first(lambda: home.checkpoints.save(self.step, state))
        self.saved_step = self.step

    def resume(self, home: RunFolder) -> int:
        """Go on from the newest whole checkpoint; return how many bytes of the history belong to it (0: a new run).

        Raises:
            AttarError: every checkpoint is damaged, or the images are not those the run began with.
        """
        state = self.ranks.on_first(home.checkpoints.latest)
        if state is None:
            return 0
        if state["data"] != self.source.fingerprint:
            raise AttarError(
                f"The images of '{self.spec.data}' have changed since the run in '{home.path}' began: "
                "choose another run folder, or overwrite it."
            )
        self.step = self.saved_step = state["step"]
        if state.get("kept"):
            self._reshape(state["kept"])
        if self.step % self.steps_per_epoch:
            # First what methods do at an epoch's start, then what they have learnt since.
            self.distiller.epoch_start(self.step // self.steps_per_epoch, self.spec.epochs)
        own = own_part(state, self.ranks, self.apart)
        self.take(own)
        self.optimizer.load_state_dict(own["optimizer"])
        self.meter.load_state_dict(own["meter"])
        self.seconds, self.best = state["seconds"], state["best"]
        self.means, self.weights = state["means"], state["weights"]
        return int(state["history"])


@dataclass(frozen=True)
class _Holdout:
    """The hold-out as images and labels, as often as it is walked through."""

    run: Run

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        run = self.run
        loader = EvalLoader(run.source.splits["holdout"], EVAL_BATCH, run.loader.normalization, run.ranks.device)
        for images, targets, _ in loader:
            yield images.contiguous(memory_format=run.memory), targets


def _schedule(
    spec: TrainSpec, optimizer: torch.optim.Optimizer, distiller: Distiller, steps_per_epoch: int
) -> Schedule:
    starts = [epoch * steps_per_epoch for epoch in distiller.schedule_starts(spec.epochs) if epoch < spec.epochs]
    return make_schedule(spec, optimizer, spec.epochs * steps_per_epoch, starts)


def _step_module(
    distiller: Distiller, ranks: Ranks, memory: torch.memory_format, compiled: bool, apart: bool
) -> nn.Module:
    # The compiler must not bring channels-last back where it was found unsafe.
    options = None if memory == torch.channels_last else {"layout_optimization": False}
    # Compile inside, DDP outside.
    compiled_or_not = torch.compile(distiller, options=options) if compiled else distiller  # type: ignore[arg-type]
    return ranks.wrap(compiled_or_not, phased=bool(distiller.phases), apart=apart)  # type: ignore[arg-type]


def batch_of(distiller: Distiller, sample: Sample, memory: torch.memory_format) -> Batch:
    """Return loaded images as a distiller takes them: partners apart, in its memory format."""
    views = distiller.views
    if not isinstance(distiller.sampling, ClassPairs):
        images = sample.images.contiguous(memory_format=memory)
        return Batch(images, sample.targets, sample.index, sample.targets, views)
    # View after view, and in each the images before their partners.
    halves = []
    for half in range(2):
        images, targets, index = (
            values.unflatten(0, (views, 2, -1))[:, half].flatten(0, 1)  # type: ignore[no-untyped-call]
            for values in (sample.images, sample.targets, sample.index)
        )
        halves.append(Batch(images.contiguous(memory_format=memory), targets, index, targets, views))
    return replace(halves[0], partners=halves[1])
