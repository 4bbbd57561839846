from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.functional import kl_divergence
from attar.functional.label_augmentation import aggregated_logits, joint_labels, transformed
from attar.methods import SLA, Supervised
from networks import IMAGES, LABELS, Net


def built(method: SLA, batch_norm: bool = False) -> attar.Distiller:
    torch.manual_seed(0)
    distiller = attar.Distiller(Net(batch_norm=batch_norm), [method], attar.Classification(3))
    return distiller.double().build(IMAGES).train()


def embedding(student: nn.Module, images: Tensor) -> Tensor:
    return student.high(student.low(images)).mean(dim=(2, 3))


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


def test_worked_example() -> None:
    joint = torch.tensor([[3.0, 0, 1, 0], [0, 2, 0, 1]], dtype=torch.float64)
    labels = torch.tensor([0])
    targets = joint_labels(labels, 2)
    assert targets.tolist() == [0, 1]
    each = nn.functional.cross_entropy(joint, targets, reduction="none")
    assert each.tolist() == pytest.approx([0.210998, 0.493812], abs=1e-6)
    assert each.mean().item() == pytest.approx(0.352405, abs=1e-6)
    aggregate = aggregated_logits(joint, 2)
    assert aggregate.tolist() == [[2.5, 1.0]]
    assert aggregate.softmax(1).flatten().tolist() == pytest.approx([0.817574, 0.182426], abs=1e-6)
    plain = torch.tensor([[1.0, 0]], dtype=torch.float64)
    ce = attar.Classification(2).loss(plain, labels).item()
    kl = kl_divergence(plain, aggregate).item()
    assert (ce, kl) == (pytest.approx(0.313262, abs=1e-6), pytest.approx(0.020636, abs=1e-6))
    assert each.mean().item() + kl + ce == pytest.approx(0.686302, abs=2e-6)


@pytest.mark.parametrize("passes", ["others", "all"])
@pytest.mark.parametrize(("large", "weight"), [(False, 1.0), (True, 4.0)])
def test_terms_by_hand(passes: str, large: bool, weight: float) -> None:
    distiller = built(SLA(temperature=2.0, large_loss=large, passes=passes))
    method, student = distiller.methods["SLA"], distiller.student
    terms = distiller((IMAGES, LABELS), 0.5)
    joint = torch.stack([method.joint_head(embedding(student, torch.rot90(IMAGES, j, (2, 3)))) for j in range(4)], 1)
    targets = torch.stack([4 * LABELS + j for j in range(4)], 1)
    ce = nn.functional.cross_entropy(joint.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(terms.losses["SLA.joint"], ce)
    mean = torch.stack([joint[:, j, j::4] for j in range(4)]).mean(0)
    torch.testing.assert_close(terms.losses["SLA.kl"], kl_divergence(student(IMAGES), mean, 2.0))
    assert {name: float(w) for name, w in terms.weights.items()} == {"task": 1.0, "SLA.joint": weight, "SLA.kl": 1.0}
    torch.testing.assert_close(terms.logits, student(IMAGES))


def test_both_ways_to_pass_agree_without_batch_norm() -> None:
    others, everything = (built(SLA(passes=passes)) for passes in ("others", "all"))
    a, b = (distiller((IMAGES, LABELS), 0.5).total() for distiller in (others, everything))
    torch.testing.assert_close(a, b)
    for name, gradient in gradients(a, others).items():
        torch.testing.assert_close(gradients(b, everything)[name], gradient, msg=name)


@pytest.mark.parametrize(("passes", "images"), [("others", [6, 18]), ("all", [6, 24])])
def test_the_student_runs_on_the_plain_images_once_and_on_the_versions_once(passes: str, images: list[int]) -> None:
    distiller = built(SLA(passes=passes))
    seen: list[int] = []
    handle = distiller.student.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    distiller((IMAGES, LABELS), 0.5)
    handle.remove()
    assert seen == images


def test_who_learns_from_what() -> None:
    distiller = built(SLA())
    method, student = distiller.methods["SLA"], distiller.student
    terms = distiller((IMAGES, LABELS), 0.5)
    kl, joint = terms.losses["SLA.kl"], terms.losses["SLA.joint"]
    assert all(g is None for g in gradients(kl, method.joint_head).values())
    assert all(g is not None and g.any() for g in gradients(kl, student.head).values())
    assert all(g is not None and g.any() for g in gradients(joint, method.joint_head).values())
    assert all(g is None for g in gradients(joint, student.head).values())  # the plain head sees upright images alone
    assert all(g is not None and g.any() for g in gradients(terms.losses["task"], student.head).values())
    for part in (student.low, student.high):
        assert all(g is not None and g.any() for g in gradients(joint, part).values())


def test_turning_an_image_turns_the_joint_answer() -> None:
    """The embedding of version j of a turned image is that of version j + 1 of the image."""
    distiller = built(SLA()).eval()
    student = distiller.student
    h = embedding(student, transformed(IMAGES, "rotation").flatten(0, 1)).unflatten(0, (6, 4))
    turned = transformed(torch.rot90(IMAGES, 1, (2, 3)), "rotation").flatten(0, 1)
    torch.testing.assert_close(embedding(student, turned).unflatten(0, (6, 4)), h.roll(-1, 1))


def test_a_plain_head_that_equals_the_ensemble_has_nothing_to_learn() -> None:
    """Property 5 for any M: with a joint head blind to the version, the upright rows as plain head give no KL."""
    distiller = built(SLA())
    method, student = distiller.methods["SLA"], distiller.student
    with torch.no_grad():
        method.joint_head.weight.zero_()  # the same answer for every version: the bias
        method.joint_head.bias.copy_(torch.randn(3).double().repeat_interleave(4))
        student.head.weight.zero_()
        student.head.bias.copy_(method.joint_head.bias[::4])
    terms = distiller((IMAGES, LABELS), 0.5)
    assert terms.losses["SLA.kl"].abs() < 1e-12


def test_deployed_are_the_plain_student_the_ensemble_or_the_joint_head() -> None:
    distiller = built(SLA(), batch_norm=True)
    distiller((IMAGES, LABELS), 0.5).total().backward()
    plain = distiller.strip()
    assert list(plain.state_dict()) == list(Net(batch_norm=True).state_dict())
    aggregated, single = (distiller.strip(deployable=f"SLA.{name}") for name in ("aggregated", "single"))
    distiller.eval()
    method, student = distiller.methods["SLA"], distiller.student
    versions = transformed(IMAGES, "rotation")
    joint = method.joint_head(embedding(student, versions.flatten(0, 1)))
    torch.testing.assert_close(aggregated(IMAGES), aggregated_logits(joint, 4))
    torch.testing.assert_close(single(IMAGES), method.joint_head(embedding(student, IMAGES))[:, ::4])
    assert student.head.out_features == 3  # the student itself is left as it was
    for network in (aggregated, single):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
        assert not {id(p) for p in network.parameters()} & {id(p) for p in distiller.parameters()}


def test_without_distillation_the_joint_head_trains_alone() -> None:
    distiller = built(SLA(distil=False))
    terms = distiller((IMAGES, LABELS), 0.5)
    assert set(terms.losses) == {"task", "SLA.joint"}
    torch.testing.assert_close(terms.total(), terms.losses["SLA.joint"])
    terms.total().backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert not distiller.student.head.weight.grad.any()


def test_label_smoothing_beside_it_is_fine_but_mixing_is_not() -> None:
    methods = [SLA(), Supervised(label_smoothing=0.1)]
    distiller = attar.Distiller(Net(), methods, attar.Classification(3)).double().build(IMAGES).train()
    assert torch.isfinite(distiller((IMAGES, LABELS), 0.5).total())
    with pytest.raises(AttarError, match="SLA needs labels, which Supervised as configured takes away"):
        attar.Distiller(Net(), [SLA(), Supervised(mixup=0.2)], attar.Classification(3))
    with pytest.raises(AttarError, match="SLA needs class indices"):
        built(SLA())((IMAGES, torch.eye(3).double().repeat(2, 1)), 0.5)


@pytest.mark.parametrize("transform", ["rotation2", "color_perm", "color_perm3", "rot_color_perm6", "rot_color_perm12"])
def test_every_transformation_trains(transform: Any) -> None:
    distiller = built(SLA(transform=transform))
    terms = distiller((IMAGES, LABELS), 0.5)
    terms.total().backward()
    assert distiller.methods["SLA"].joint_head.out_features == 3 * distiller.methods["SLA"].versions
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"transform": "flip"}, "one of rotation, rotation2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"passes": "one"}, "'others' or 'all'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        SLA(**options)


def test_images_that_cannot_be_turned_are_refused() -> None:
    distiller = attar.Distiller(Net(), [SLA()], attar.Classification(3))
    with pytest.raises(AttarError, match="not 16 x 12: crop them square or use transform=rotation2"):
        distiller.build(torch.randn(2, 3, 16, 12))
    attar.Distiller(Net(), [SLA(transform="rotation2")], attar.Classification(3)).build(torch.randn(2, 3, 16, 12))
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    distiller = attar.Distiller(net, [SLA(transform="color_perm3")], attar.Classification(3), stages=["0"])
    with pytest.raises(AttarError, match="these have 1: use rotation"):
        distiller.build(torch.randn(2, 1, 16, 16))


class TwoHeads(Net):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.high(self.low(images)).mean(dim=(2, 3))
        return (self.other(x) + self.head(x)) / 2


class ConvHead(Net):
    def forward(self, images: Tensor) -> Tensor:
        x = self.high(self.low(images))
        return nn.functional.conv2d(x, self.head.weight[:, :, None, None], self.head.bias).mean(dim=(2, 3))


@pytest.mark.parametrize("network", [TwoHeads, ConvHead])
def test_no_ensemble_is_promised_where_no_layer_alone_gives_the_logits(network: type[Net]) -> None:
    distiller = attar.Distiller(network(), [SLA()], attar.Classification(3)).double().build(IMAGES).train()
    assert distiller.deployables() == {}
    distiller((IMAGES, LABELS), 0.5).total().backward()
    assert all(p.grad is not None for p in distiller.parameters())
    distiller.strip()
    with pytest.raises(AttarError, match="leave distil on"):
        attar.Distiller(network(), [SLA(distil=False)], attar.Classification(3)).double().build(IMAGES)


def test_it_shares_the_plain_pass_with_frskd() -> None:
    methods = [attar.methods.FRSKD(), SLA()]
    torch.manual_seed(0)
    distiller = attar.Distiller(Net(), methods, attar.Classification(3)).double().build(IMAGES).train()
    seen: list[int] = []
    handle = distiller.student.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    terms = distiller((IMAGES, LABELS), 0.5)
    handle.remove()
    assert seen == [6, 18]
    assert set(terms.losses) == {"task", "FRSKD.ce_teacher", "FRSKD.kl", "FRSKD.features", "SLA.joint", "SLA.kl"}
    terms.total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())
    distiller.strip()
