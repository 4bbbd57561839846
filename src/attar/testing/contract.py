"""The method contract as a test class: subclass it, say which method on which student, and run it with pytest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attar.distiller import Distiller
from attar.method import Batch, Method, Terms
from attar.sampling import ClassPairs
from attar.tasks import Classification, Segmentation, Task

__all__ = ["MethodContract"]


class MethodContract:
    """What every method promises on every student it accepts.

    Subclass it as `TestMyMethod` and define `method()` (a new, unbuilt method) and `student()` (a new network); pytest
    collects the inherited tests. `num_classes`, `image_size` (one number or height and width), `channels` and
    `batch_size` may be changed, and so may `task()`: for segmentation the batch has masks with void pixels.

    Example:
        >>> import torch, attar
        >>> class TestOneOnMyNet(attar.testing.MethodContract):
        ...     image_size = 16
        ...     def method(self):
        ...         return attar.methods.ONE(branches=2)
        ...     def student(self):
        ...         return torch.nn.Sequential(...)
    """

    num_classes = 5
    image_size: int | tuple[int, int] = 32
    channels = 3
    batch_size = 4
    compile_backend = "aot_eager"

    def method(self) -> Method:
        """Return a new, unbuilt method."""
        raise TypeError(f"{type(self).__name__} must define method().")

    def student(self) -> nn.Module:
        """Return a new student."""
        raise TypeError(f"{type(self).__name__} must define student().")

    def task(self) -> Task:
        """Return what the student is trained for."""
        return Classification(self.num_classes)

    def batch(self) -> Batch:
        """Return a training batch that the method accepts."""
        views = self.method().views
        generator = torch.Generator().manual_seed(1)
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        images = torch.randn(views * self.batch_size, self.channels, height, width, generator=generator)
        task = self.task()
        if isinstance(task, Segmentation):
            masks = torch.randint(task.num_classes, (views * self.batch_size, height, width), generator=generator)
            masks[:, : height // 4] = task.ignore_index
            return Batch(images, masks, torch.arange(self.batch_size).repeat(views), masks, views)
        # Pairs of one class, for methods that relate them.
        targets = (torch.arange(self.batch_size) // 2 % self.num_classes).repeat(views)
        index = torch.arange(self.batch_size).repeat(views)
        batch = Batch(images, targets, index, targets, views)
        if isinstance(self.method().sampling, ClassPairs):
            # Another image of the same class.
            batch = replace(batch, partners=replace(batch, images=images.flip(-1), index=index + self.batch_size))
        return batch

    def distiller(self) -> Distiller:
        """Return a built distiller in training mode, the same at every call."""
        torch.manual_seed(0)
        student = self.student()
        own = torch.Generator().manual_seed(0)  # the method's teachers are drawn from the global one
        with torch.no_grad():
            for parameter in student.parameters():
                # A classifier that starts at zero answers all images alike: there is nothing to distil yet.
                if parameter.ndim > 1 and not parameter.any():
                    parameter.normal_(std=0.02, generator=own)
        distiller = Distiller(student, [self.method()], self.task())
        return distiller.build(self.batch().images, 2 * self.batch_size).train()

    @staticmethod
    def step(
        distiller: Distiller, batch: Batch, progress: float = 0.5, run: Callable[..., Terms] | None = None
    ) -> tuple[Terms, dict[str, Tensor | None]]:
        """Run one seeded step from the distiller's current state; return its terms and every parameter's gradient."""
        distiller.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        terms = (distiller if run is None else run)(batch, torch.tensor(progress))
        terms.total().backward()
        return terms, {name: parameter.grad for name, parameter in distiller.named_parameters()}

    def test_terms_are_named_finite_scalars_with_weights(self) -> None:
        """Every term is a finite scalar, has a weight, and every declared weight has its term."""
        distiller = self.distiller()
        method = next(iter(distiller._methods()))
        batch = self.batch()
        for progress in (0.0, 0.5, 1.0):
            terms, _ = self.step(distiller, batch, progress)
            self.assert_finite_scalars(terms)
            declared = {f"{method.name}.{term}" for term in method.weights(torch.tensor(progress))}
            assert declared <= terms.losses.keys(), "a weight is declared for a term that does not exist"

    @staticmethod
    def assert_finite_scalars(terms: Terms) -> None:
        """Every term is a finite scalar and has a weight."""
        assert terms.losses.keys() == terms.weights.keys()
        for name, loss in terms.losses.items():
            assert loss.shape == (), f"{name} is no scalar"
            assert torch.isfinite(loss), f"{name} is {loss.item()}"

    def test_every_trainable_tensor_gets_a_gradient(self) -> None:
        """No parameter is left out of the step, at the start of a run and later: distributed training would hang.

        With phases: of all steps together.
        """
        distiller = self.distiller()
        trained: set[str] = set()
        for phase in (*range(len(distiller.phases)), None):
            distiller.enter(phase)
            for progress in (0.0, 1.0):
                _, gradients = self.step(distiller, self.batch(), progress)
                missing = [name for name, gradient in gradients.items() if gradient is None]
                assert not missing or distiller.phases, f"no gradient: {missing}"
                trained |= gradients.keys() - set(missing)
                found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
                bad = [name for name, gradient in found.items() if not torch.isfinite(gradient).all()]
                assert not bad, f"gradient not finite: {bad}"
        assert trained == {name for name, _ in distiller.named_parameters()}

    def test_phases_train_something_and_no_more(self) -> None:
        """Every phase has finite terms that move parameters, and its terms alone; the main training follows."""
        distiller = self.distiller()
        for number, (method, phase) in enumerate(distiller.phases):
            distiller.enter(number)
            terms, gradients = self.step(distiller, self.batch())
            self.assert_finite_scalars(terms)
            assert all(name.startswith(f"{method.name}.") for name in terms.losses)
            moved = [name for name, g in gradients.items() if g is not None and bool(g.any())]
            assert moved, f"{phase.name} trains nothing"
            if phase.until == ():
                assert not [name for name in moved if name.startswith("student.")], f"{phase.name} moves the student"
        distiller.enter(None)
        terms, _ = self.step(distiller, self.batch())
        assert "task" in terms.losses

    def test_terms_move_the_student(self) -> None:
        """At least one weighted term of a method that has terms changes the student's gradient."""
        distiller = self.distiller()
        method = next(iter(distiller._methods()))
        # A step before it, on other images, for methods that remember it.
        before = self.batch()
        self.step(distiller, replace(before, images=before.images.flip(-2)), 1.0)
        terms, with_method = self.step(distiller, self.batch(), 1.0)
        if not any(name.startswith(f"{method.name}.") for name in terms.losses):
            return
        torch.manual_seed(0)
        plain = Distiller(self.student(), [], distiller.task).build(self.batch().images).train()
        plain.student.load_state_dict(self.distiller().student.state_dict())
        _, without = self.step(plain, self.batch(), 1.0)
        changed = any(
            not torch.allclose(gradient, with_method[name])  # type: ignore[arg-type]
            for name, gradient in without.items()
            if gradient is not None
        )
        assert changed, f"{method.name} leaves every gradient of the student as plain training has it"

    def test_strip_gives_the_original_network_back(self) -> None:
        """Original class and keys, bit-identical logits, no hooks, loads into a new student strictly."""
        distiller = self.distiller()
        self.step(distiller, self.batch())
        stripped = distiller.strip(prove_export=False)
        fresh = self.student()
        assert type(stripped) is type(fresh)
        assert list(stripped.state_dict()) == list(fresh.state_dict())
        fresh.load_state_dict(stripped.state_dict(), strict=True)
        images = self.batch().images
        distiller.eval()
        with torch.no_grad():
            before, after, again = map(
                distiller.task.logits, (distiller.student(images), stripped(images), fresh.eval()(images))
            )
        assert torch.equal(after, before)
        assert torch.equal(after, again)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in stripped.modules())
        inplace = {name: getattr(module, "inplace", None) for name, module in fresh.named_modules()}
        assert inplace == {name: getattr(module, "inplace", None) for name, module in stripped.named_modules()}

    def test_void_pixels_change_nothing(self) -> None:
        """In dense tasks no term depends on what student or teachers answer for void pixels."""
        batch = self.batch()
        valid = self.task().valid(batch.targets)
        if valid is None:
            return
        void = ~valid.unsqueeze(1)
        seen = []
        for size in (0.0, 30.0):
            distiller = self.distiller()
            generator = torch.Generator().manual_seed(2)
            noise = torch.randn(len(void), distiller.task.num_classes, *void.shape[2:], generator=generator)
            moved = (size * noise * void).requires_grad_()
            networks: list[nn.Module] = [distiller.student]
            networks += [teacher.network for method in distiller._methods() for teacher in method.teachers]
            for network in networks:
                network.register_forward_hook(_moving(distiller.task, moved))
            terms, _ = self.step(distiller, batch, 1.0)
            gradient = moved.grad
            assert gradient is not None
            assert gradient[valid.unsqueeze(1).expand_as(gradient)].any()
            assert not gradient[void.expand_as(gradient)].any(), "void pixels get a gradient"
            seen.append(terms.losses)
        for name, loss in seen[0].items():
            assert torch.equal(loss, seen[1][name]), f"{name} depends on void pixels"

    def test_state_round_trip(self) -> None:
        """A new distiller with the saved state takes the same step."""
        first = self.distiller()
        state = copy.deepcopy(first.state_dict())
        torch.manual_seed(0)
        second = Distiller(self.student(), [self.method()], first.task)
        torch.manual_seed(123)  # other auxiliaries, but the same teachers
        second.build(self.batch().images, 2 * self.batch_size).train()
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.normal_()
        second.load_state_dict(state)
        for phase in (*range(len(first.phases)), None):
            first.enter(phase)
            second.enter(phase)
            _, before = self.step(first, self.batch())
            _, after = self.step(second, self.batch())
            for name, gradient in before.items():
                assert gradient is after[name] or torch.equal(gradient, after[name]), name  # type: ignore[arg-type]

    def test_teachers_stay_frozen_and_unregistered(self) -> None:
        """Teachers are no parameters, no state, stay in evaluation mode, and no bit of them changes."""
        distiller = self.distiller()
        for method in distiller._methods():
            for teacher in method.teachers:
                own = {id(parameter) for parameter in distiller.parameters()}
                assert not own & {id(parameter) for parameter in teacher.network.parameters()}
                before = copy.deepcopy(teacher.network.state_dict())
                distiller.train()
                self.step(distiller, self.batch())
                assert not any(module.training for module in teacher.network.modules())
                assert all(torch.equal(value, before[key]) for key, value in teacher.network.state_dict().items())
                assert all(parameter.grad is None for parameter in teacher.network.parameters())

    def test_compiled_step_equals_eager(self) -> None:
        """`torch.compile(fullgraph=True)` gives eager's losses and gradients."""
        eager = self.distiller()
        state = copy.deepcopy(eager.state_dict())
        expected, gradients = self.step(eager, self.batch())
        eager.load_state_dict(state)
        torch._dynamo.reset()
        compiled = torch.compile(eager, fullgraph=True, backend=self.compile_backend)
        terms, compiled_gradients = self.step(eager, self.batch(), run=compiled)
        for name, loss in expected.losses.items():
            torch.testing.assert_close(terms.losses[name], loss, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients.items():
            if gradient is None:
                assert compiled_gradients[name] is None
                continue
            scale = float(gradient.abs().max())
            torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-5 + 1e-3 * scale)

    def test_losses_are_full_precision_under_autocast(self) -> None:
        """Under bfloat16 autocast every term is computed in float32."""
        distiller = self.distiller()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            terms = distiller(self.batch(), torch.tensor(0.5))
        for name, loss in terms.losses.items():
            assert loss.dtype == torch.float32, f"{name} is {loss.dtype}"
            assert torch.isfinite(loss), name


def _moving(task: Task, moved: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    """A hook that adds to the logits that a network returns."""

    def hook(network: nn.Module, args: Any, output: Any) -> Any:
        logits = task.logits(output)
        if isinstance(output, Mapping):
            return {name: value + moved if value is logits else value for name, value in output.items()}
        if isinstance(output, tuple):
            return (logits + moved, *output[1:])
        return logits + moved

    return hook
