from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.functional import kl_divergence
from attar.methods import PCL
from attar.methods.pcl import FeatureEnsemble
from networks import IMAGES, LABELS, Net

VIEWS = torch.randn(3, *IMAGES.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(11))


def built(method: PCL, seed: int = 0, batch_norm: bool = False, network: type[nn.Module] = Net) -> attar.Distiller:
    torch.manual_seed(seed)
    student = network(batch_norm=batch_norm) if network is Net else network()
    return attar.Distiller(student.double(), [method], attar.Classification(3)).build(IMAGES).train()


def batch(views: Tensor = VIEWS) -> attar.Batch:
    return attar.Batch(views.flatten(0, 1), LABELS.repeat(len(views)), views=len(views))


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


def nothing(found: dict[str, Tensor | None]) -> bool:
    return all(gradient is None or not gradient.any() for gradient in found.values())


def everything(found: dict[str, Tensor | None]) -> bool:
    return all(gradient is not None and gradient.any() for gradient in found.values())


def answers(distiller: attar.Distiller, views: Tensor = VIEWS) -> tuple[list[Tensor], list[Tensor]]:
    """Embeddings and logits of the branches, each on its view, from their own layers."""
    student = distiller.student
    tails = [student, *(branch.tail for branch in distiller.methods["PCL"].branches)]
    low = [student.low(view) for view in views] if len(views) > 1 else [student.low(views[0])] * len(tails)
    f = [tail.high(x).mean(dim=(2, 3)) for tail, x in zip(tails, low, strict=True)]
    return f, [tail.head(x) for tail, x in zip(tails, f, strict=True)]


def means(distiller: attar.Distiller, views: Tensor = VIEWS) -> list[Tensor]:
    """Logits of the averaged branches, each on its view."""
    trunk, *tails = distiller.methods["PCL"].mean
    views = views if len(views) > 1 else views.expand(len(tails), *views.shape[1:])
    return [tail(*trunk(view)) for tail, view in zip(tails, views, strict=True)]


def stirred(distiller: attar.Distiller) -> attar.Distiller:
    """Let the averaged network differ from the trained one, and stay so in the next step."""
    torch.manual_seed(5)
    method = distiller.methods["PCL"]
    with torch.no_grad():
        for buffer in method.mean.buffers():
            if buffer.is_floating_point():
                buffer.add_(0.3 * torch.randn_like(buffer))
    method.steps.fill_(5000)
    return distiller


@pytest.mark.parametrize("own_views", [True, False])
def test_the_objective_by_hand(own_views: bool) -> None:
    distiller = stirred(built(PCL(own_views=own_views, temperature=2.0)))
    views = VIEWS if own_views else VIEWS[:1]
    progress = torch.tensor(40 / 300, dtype=torch.float64)
    terms = distiller(batch(views), progress)
    f, z = answers(distiller, views)
    ensemble = distiller.methods["PCL"].classifier(torch.cat(f, 1))
    averaged = [mean.detach() for mean in means(distiller, views)]

    def divergence(target: Tensor, answer: Tensor) -> Tensor:
        target = (target.detach() / 2).softmax(1)
        return 4 * (target * (target.log() - (answer / 2).log_softmax(1))).sum() / 6

    ce = distiller.task.loss
    hard = [ce(answer, LABELS) for answer in z]
    of_ensemble = sum(divergence(ensemble, answer) for answer in z)
    of_means = sum(divergence(averaged[k], z[j]) / 2 for j in range(3) for k in range(3) if k != j)
    assert terms.losses.keys() == {
        "task",
        *(f"PCL.{t}" for t in ("ce_branches", "ce_ensemble", "kl_ensemble", "kl_mean")),
    }
    torch.testing.assert_close(terms.logits, z[0])
    torch.testing.assert_close(terms.losses["task"], hard[0])
    torch.testing.assert_close(terms.losses["PCL.ce_branches"], hard[1] + hard[2])
    torch.testing.assert_close(terms.losses["PCL.ce_ensemble"], ce(ensemble, LABELS))
    torch.testing.assert_close(terms.losses["PCL.kl_ensemble"], of_ensemble)
    torch.testing.assert_close(terms.losses["PCL.kl_mean"], of_means)
    assert min(of_ensemble.item(), of_means.item()) > 1e-4
    whole = sum(hard) + ce(ensemble, LABELS) + 0.2865048 * (of_ensemble + of_means)
    torch.testing.assert_close(terms.total(), whole)
    expected, found = gradients(whole, distiller), gradients(terms.total(), distiller)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_without_distillation_it_is_branches_and_their_classifier_under_cross_entropy() -> None:
    distiller = built(PCL(ensemble_weight=0.0, mean_weight=0.0))
    total = distiller(batch(), 1.0).total()
    f, z = answers(distiller)
    ce = distiller.task.loss
    by_hand = sum(ce(answer, LABELS) for answer in z) + ce(distiller.methods["PCL"].classifier(torch.cat(f, 1)), LABELS)
    torch.testing.assert_close(total, by_hand)
    expected, found = gradients(by_hand, distiller), gradients(total, distiller)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_distillation_reaches_neither_the_joint_classifier_nor_the_averages() -> None:
    distiller = stirred(built(PCL()))
    method = distiller.methods["PCL"]
    losses = distiller(batch(), 1.0).losses
    for term in ("PCL.kl_ensemble", "PCL.kl_mean"):
        assert nothing(gradients(losses[term], method.classifier))
        for part in (distiller.student, method.branches):
            assert everything(gradients(losses[term], part))
    assert everything(gradients(losses["PCL.ce_ensemble"], method.classifier))
    # The classifier of features trains the features, but no branch's own classifier.
    of_ensemble = gradients(losses["PCL.ce_ensemble"], distiller)
    heads = {name for name in of_ensemble if ".head." in name}
    assert len(heads) == 6
    for name, gradient in of_ensemble.items():
        assert (gradient is None or not gradient.any()) == (name in heads), name
    assert not any(buffer.requires_grad for buffer in method.mean.buffers())


def test_averages_are_saved_but_no_parameters() -> None:
    distiller = built(PCL())
    assert not any("mean" in name for name, _ in distiller.named_parameters())
    saved = {name for name in distiller.state_dict() if ".mean." in name}
    assert len(saved) == len(list(distiller.student.parameters())) + 2 * 4
    assert "methods.PCL.steps" in distiller.state_dict()


def weights(distiller: attar.Distiller) -> list[Tensor]:
    """Everything that is averaged, in the averaged network's order."""
    return [getattr(live, name).detach().clone() for live, _, name in distiller.methods["PCL"]._averaged]


def averages(distiller: attar.Distiller) -> list[Tensor]:
    return [getattr(mean, name).clone() for _, mean, name in distiller.methods["PCL"]._averaged]


def test_averages_after_every_step() -> None:
    distiller = built(PCL(branches=2))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.5)
    history, found = [], []
    for _ in range(4):
        distiller(batch(VIEWS[:2]), 1.0).total().backward()
        found.append(averages(distiller))
        optimizer.step()
        optimizer.zero_grad()
        history.append(weights(distiller))
    start = weights(built(PCL(branches=2)))
    for i, first in enumerate(history[0]):
        assert torch.equal(found[0][i], start[i]), "before the first step they are the weights"
        assert torch.equal(found[1][i], first), "after step g = 0 they are the weights"
        torch.testing.assert_close(found[2][i], (first + history[1][i]) / 2)
        torch.testing.assert_close(found[3][i], (first + history[1][i] + history[2][i]) / 3)
        assert not torch.equal(first, history[1][i])


@pytest.mark.parametrize(
    ("steps", "decay"), [(1, 0.0), (2, 0.5), (500, 0.998), (1000, 0.999), (1001, 0.999), (10**6, 0.999)]
)
def test_how_much_is_kept_of_the_averages(steps: int, decay: float) -> None:
    distiller = stirred(built(PCL(branches=1)))
    method = distiller.methods["PCL"]
    method.steps.fill_(steps)  # the next forward sees what step g = steps - 1 has left
    before = averages(distiller)
    distiller(batch(VIEWS[:1]), 1.0)
    assert int(method.steps) == steps + 1
    for old, new, theta in zip(before, averages(distiller), weights(distiller), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * theta, rtol=1e-10, atol=1e-12)


def test_in_evaluation_mode_nothing_is_averaged() -> None:
    distiller = stirred(built(PCL())).eval()
    before = copy.deepcopy(distiller.state_dict())
    distiller(batch(), 1.0)
    assert all(torch.equal(value, before[name]) for name, value in distiller.state_dict().items())


def test_a_branch_does_not_learn_from_its_own_average() -> None:
    distiller = stirred(built(PCL(mean_decay=0.999)))
    method = distiller.methods["PCL"]

    def learnt() -> list[dict[str, Tensor | None]]:
        loss = distiller(batch(), 1.0).losses["PCL.kl_mean"]
        tails = [distiller.student.head, *(branch.tail.head for branch in method.branches)]
        return [gradients(loss, tail) for tail in tails]

    distiller.eval()  # so that the averages stay as they are set
    before = learnt()
    for j in range(3):
        kept = method.mean[1 + j].head.weight.clone()
        with torch.no_grad():
            method.mean[1 + j].head.weight.normal_()
        after = learnt()
        for i in range(3):
            assert torch.equal(after[i]["weight"], before[i]["weight"]) == (i == j)
        method.mean[1 + j].head.weight.copy_(kept)


def test_one_branch_has_its_own_classifier_as_only_teacher() -> None:
    distiller = built(PCL(branches=1))
    assert distiller.views == 1
    terms = distiller((IMAGES, LABELS), 1.0)
    assert terms.losses["PCL.kl_mean"] == 0
    assert terms.losses["PCL.ce_branches"] == 0
    embedding = distiller.student.high(distiller.student.low(IMAGES)).mean(dim=(2, 3))
    teacher = distiller.methods["PCL"].classifier(embedding)
    torch.testing.assert_close(terms.losses["PCL.kl_ensemble"], kl_divergence(distiller.student(IMAGES), teacher, 3.0))
    terms.total().backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())


@pytest.mark.parametrize(("epoch", "expected"), [(0, 0.006738), (10, 0.021750), (40, 0.286505), (80, 1.0), (300, 1.0)])
def test_ramp(epoch: int, expected: float) -> None:
    found = PCL(mean_weight=2.0).weights(torch.tensor(epoch / 300, dtype=torch.float64))
    assert {name: float(weight) for name, weight in found.items()} == pytest.approx(
        {"kl_ensemble": expected, "kl_mean": 2 * expected}, abs=2e-6
    )


def test_every_branch_sees_its_own_view() -> None:
    distiller = built(PCL())
    assert distiller.views == 3
    views = VIEWS.clone().requires_grad_()
    terms = distiller(batch(views), 1.0)

    def seen(loss: Tensor) -> list[bool]:
        (gradient,) = torch.autograd.grad(loss, views, retain_graph=True)
        return [bool(view.any()) for view in gradient]

    assert terms.logits.shape == (6, 3)
    assert seen(terms.losses["task"]) == [True, False, False]
    assert seen(terms.losses["PCL.ce_branches"]) == [False, True, True]
    assert seen(terms.losses["PCL.ce_ensemble"]) == [True, True, True]
    _, z = answers(distiller)
    assert len({round(answer.sum().item(), 6) for answer in z}) == 3


def test_one_view_for_all_runs_the_trunk_once() -> None:
    distiller = built(PCL(own_views=False))
    runs: list[int] = []
    distiller.student.low.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    distiller((IMAGES, LABELS), 1.0)
    assert runs == [6]
    distiller = built(PCL())
    distiller.student.low.register_forward_hook(lambda module, args, output: runs.append(len(output)))
    distiller(batch(), 1.0)
    assert runs == [6, 6, 6, 6]


def test_published_size_of_the_joint_classifier() -> None:
    import timm

    import attar.zoo

    student = timm.create_model("cifar_resnet32", num_classes=100)
    distiller = attar.Distiller(student, [PCL()], attar.Classification(100)).build(torch.zeros(2, 3, 32, 32))
    assert sum(p.numel() for p in distiller.methods["PCL"].classifier.parameters()) == 19_300


def trained(distiller: attar.Distiller, steps: range) -> attar.Distiller:
    for step in steps:
        distiller(batch(VIEWS.roll(step, 1)), step / 6).total().backward()
        with torch.no_grad():
            for parameter in distiller.parameters():
                parameter -= 0.2 * parameter.grad
        distiller.zero_grad()
    return distiller


def test_resumed_to_the_last_bit() -> None:
    whole = trained(built(PCL(), batch_norm=True), range(6))
    stopped = trained(built(PCL(), batch_norm=True), range(3))
    file = io.BytesIO()
    torch.save(stopped.state_dict(), file)
    file.seek(0)
    resumed = built(PCL(), seed=99, batch_norm=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    found = trained(resumed, range(3, 6)).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.state_dict().items())
    assert int(found["methods.PCL.steps"]) == 6


def test_branches_to_keep_answer_as_in_training() -> None:
    distiller = trained(built(PCL(), batch_norm=True), range(3)).eval()
    same = IMAGES.expand(3, *IMAGES.shape)
    _, z = answers(distiller, same)
    assert torch.equal(distiller.strip()(IMAGES), z[0])
    for number in (1, 2):
        peer = distiller.strip(f"PCL.peer{number}")
        assert torch.equal(peer(IMAGES), z[number])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in peer.modules())


def test_the_ensemble_to_keep_is_the_joint_classifier() -> None:
    distiller = trained(built(PCL(), batch_norm=True), range(3)).eval()
    f, _ = answers(distiller, IMAGES.expand(3, *IMAGES.shape))
    ensemble = distiller.strip(deployable="PCL.ensemble")
    assert isinstance(ensemble, FeatureEnsemble)
    torch.testing.assert_close(ensemble(IMAGES), distiller.methods["PCL"].classifier(torch.cat(f, 1)))
    assert not any(m._forward_pre_hooks for m in distiller.strip().modules())


def test_averages_to_keep() -> None:
    distiller = trained(built(PCL(), batch_norm=True), range(3)).eval()
    expected = means(distiller, IMAGES.expand(3, *IMAGES.shape))
    count = sum(p.numel() for p in distiller.student.parameters())
    for name, logits in zip(("student", "peer1", "peer2"), expected, strict=True):
        mean = distiller.strip(f"PCL.mean_{name}")
        assert torch.equal(mean(IMAGES), logits)
        assert not torch.equal(mean(IMAGES), distiller.student(IMAGES))
        assert sum(p.numel() for p in mean.parameters()) == count
        assert all(p.requires_grad for p in mean.parameters())
    # What is kept is a copy: training goes on.
    trained(distiller.train(), range(3, 4))
    assert torch.equal(mean(IMAGES), expected[-1])


def test_the_averages_normalise_by_the_batch_and_keep_statistics_of_their_own() -> None:
    distiller = built(PCL(branches=2), batch_norm=True)
    method = distiller.methods["PCL"]
    trained_norm, averaged = distiller.student.low[1], method.mean[0].get_submodule("low.1")
    before = averaged.running_mean.clone()
    distiller(batch(VIEWS[:2]), 1.0)
    assert averaged.training
    assert int(averaged.num_batches_tracked) == 2, "once for every view"
    # The first averages are the weights themselves and see what those see.
    torch.testing.assert_close(averaged.running_mean, trained_norm.running_mean)
    assert not torch.equal(averaged.running_mean, before)
    with torch.no_grad():
        trained_norm.running_mean.add_(1.0)
    kept = averaged.running_mean.clone()
    distiller.eval()(batch(VIEWS[:2]), 1.0)
    assert not averaged.training
    assert torch.equal(averaged.running_mean, kept)


class Dropping(nn.Module):
    """Drops features by a function call in its trunk, which knows its mode from the network alone."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh())
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, 2, 1), nn.Tanh())
        self.high = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.dropout(self.low(images), 0.5, training=self.training)
        return self.head(self.high(self.middle(x)).mean(dim=(2, 3)))


def test_the_trunk_of_the_other_views_is_in_the_students_mode() -> None:
    distiller = built(PCL(branches=2, cut="middle"), network=Dropping)

    def twice(mode: bool) -> bool:
        distiller.train(mode)
        losses = [distiller(batch(VIEWS[:2]), 1.0).losses["PCL.ce_branches"] for _ in range(2)]
        return torch.equal(*losses)

    assert [twice(mode) for mode in (True, False, True)] == [False, True, False]


class ClassMaps(nn.Module):
    """Its classifier is a convolution: the embedding is the pooled last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh())
        self.high = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.Tanh())
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.leave(self.high(self.low(images))).mean(dim=(2, 3))


def test_without_a_linear_classifier_the_pooled_last_stages_are_joined() -> None:
    distiller = built(PCL(branches=2), network=ClassMaps)
    loss = distiller(batch(VIEWS[:2]), 1.0).losses["PCL.ce_ensemble"]
    method = distiller.methods["PCL"]
    tails = [distiller.student, method.branches[0].tail]
    f = [t.high(distiller.student.low(view)).mean(dim=(2, 3)) for t, view in zip(tails, VIEWS[:2], strict=True)]
    torch.testing.assert_close(loss, distiller.task.loss(method.classifier(torch.cat(f, 1)), LABELS))


def test_tied_weights_are_averaged_once() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Conv2d(8, 8, 1)
            self.once_more = nn.Conv2d(8, 8, 1)
            self.once_more.weight = self.again.weight

        def forward(self, images: Tensor) -> Tensor:
            x = self.once_more(torch.tanh(self.again(self.high(self.low(images)))))
            return self.head(x.mean(dim=(2, 3)))

    distiller = stirred(built(PCL(branches=2, cut="low"), network=Tied))
    method = distiller.methods["PCL"]
    method.steps.fill_(2)
    tail = method.mean[1]
    before = [tail.again.weight.clone(), tail.once_more.weight.clone()]
    distiller(batch(VIEWS[:2]), 1.0)
    for old, new in zip(before, (tail.again.weight, tail.once_more.weight), strict=True):
        torch.testing.assert_close(new, (old + distiller.student.again.weight) / 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"branches": 0}, "at least one branch, not 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"ramp": -0.1}, "between 0 and 1"),
        ({"mean_decay": 1.0}, "at least 0 and below 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        PCL(**options)


def test_two_methods_that_give_views_away_are_refused() -> None:
    class Other(PCL):
        pass

    attar.Distiller(Net(), [PCL(), Other(own_views=False)], attar.Classification(3))
    with pytest.raises(AttarError, match="PCL needs views, which Other as configured takes away"):
        attar.Distiller(Net(), [PCL(), Other()], attar.Classification(3))
