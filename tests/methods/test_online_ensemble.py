from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
import attar.zoo
from attar.errors import AttarError
from attar.methods import OnlineEnsemble
from attar.train import fit
from networks import IMAGES, LABELS, Net
from runs import quiet, tiny

BATCH = (IMAGES, LABELS)


def built(method: OnlineEnsemble, classes: int = 3, batch_norm: bool = False) -> attar.Distiller:
    """Base `low`, block `high` with 8, and of narrower students fewer channels, and a head."""
    torch.manual_seed(0)
    distiller = attar.Distiller(Net(classes, batch_norm), [method], attar.Classification(classes))
    distiller.double().build(IMAGES)
    with torch.no_grad():
        for parameter in distiller.parameters():
            parameter.mul_(1.5)
    return distiller


def built_resnet(depth: int, students: int) -> attar.Distiller:
    torch.manual_seed(0)
    student = timm.create_model(f"cifar_resnet{depth}", num_classes=10)
    distiller = attar.Distiller(student, [OnlineEnsemble(students=students)], attar.Classification(10))
    return distiller.build(torch.randn(2, 3, 32, 32))


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


def nothing(loss: Tensor, module: nn.Module) -> bool:
    return all(gradient is None or not gradient.any() for gradient in gradients(loss, module).values())


def everything(loss: Tensor, module: nn.Module) -> bool:
    return all(gradient is not None and gradient.any() for gradient in gradients(loss, module).values())


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def tails(distiller: attar.Distiller) -> list[nn.Module]:
    return [student.tail for student in distiller.methods["OnlineEnsemble"].students]


def answers(distiller: attar.Distiller, images: Tensor = IMAGES) -> tuple[list[Tensor], list[Tensor]]:
    """Maps behind the block and logits of all students, from their own layers."""
    maps = [part.high(distiller.student.low(images)) for part in (distiller.student, *tails(distiller))]
    parts = (distiller.student, *tails(distiller))
    return maps, [part.head(x.mean(dim=(2, 3))) for part, x in zip(parts, maps, strict=True)]


TABLE_1 = {
    20: (272_474, 171_536, 97_018, 42_231, 10_773),
    110: (1_730_714, 1_086_716, 610_198, 262_161, 63_063),
}


@pytest.mark.parametrize("depth", [20, pytest.param(110, marks=pytest.mark.slow)])
def test_published_sizes(depth: int) -> None:
    distiller = built_resnet(depth, 5)
    method = distiller.methods["OnlineEnsemble"]
    others = distiller.deployables()
    sizes = [count(distiller.student), *(count(others[f"OnlineEnsemble.student{j}"]) for j in range(2, 6))]
    assert tuple(sizes) == TABLE_1[depth]
    assert count(others["OnlineEnsemble.ensemble"]) == sum(sizes) - 4 * 464
    assert [[a.in_channels for a in of_student] for of_student in method.adapters] == [
        [12, 25, 51],
        [9, 19, 38],
        [6, 12, 25],
        [3, 6, 12],
    ]
    assert all([a.out_channels for a in of_student] == [16, 32, 64] for of_student in method.adapters)
    # Four students' weights and, for each, the biases of three convolutions.
    assert count(method.adapters) == 10_528 + 4 * (16 + 32 + 64)
    whole = {20: (62.95, 35.61, 15.50, 3.95), 110: (62.79, 35.26, 15.15, 3.64)}[depth]
    assert [round(100 * size / sizes[0], 2) for size in sizes[1:]] == pytest.approx(whole, abs=0.011)


def test_the_base_is_what_the_paper_says_and_narrower_students_project_its_width() -> None:
    distiller = built_resnet(20, 2)
    method = distiller.methods["OnlineEnsemble"]
    halves = method._split[0]
    assert (halves.cut, count(halves.trunk)) == ("act1", 464)
    assert [stage.name for stage in method._blocks] == ["layer1", "layer2", "layer3"]
    first = tails(distiller)[0].layer1[0]
    assert [tuple(m.weight.shape) for m in (first.conv1, first.downsample[0])] == [(8, 16, 3, 3), (8, 16, 1, 1)]
    assert isinstance(tails(distiller)[0].layer1[1].downsample, nn.Identity)
    assert isinstance(distiller.student.layer1[0].downsample, nn.Identity)
    depth = [sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in t.modules()) for t in tails(distiller)]
    assert depth == [18]


@pytest.mark.parametrize(
    ("model", "cut", "blocks"),
    [
        ("cifar_wrn_16_1", "conv1", ["layer1", "layer2", "act"]),
        ("cifar_resnet18", "layer1", ["layer2", "layer3", "layer4"]),
    ],
)
def test_where_other_networks_are_cut(model: str, cut: str, blocks: list[str]) -> None:
    student = timm.create_model(model, num_classes=3, width=0.25)
    distiller = attar.Distiller(student, [OnlineEnsemble(students=2)], attar.Classification(3))
    method = distiller.build(torch.randn(2, 3, 16, 16)).methods["OnlineEnsemble"]
    assert method._split[0].cut == cut
    assert [stage.name for stage in method._blocks] == blocks
    assert [a.in_channels for a in method.adapters[0]] == [stage.channels // 2 for stage in method._blocks]


def test_hand_check() -> None:
    distiller = built(OnlineEnsemble(students=2, beta=0.0), classes=2)
    with torch.no_grad():
        for part, logits in zip((distiller.student, *tails(distiller)), ((2.0, 0.0), (0.0, 1.0)), strict=True):
            part.head.weight.zero_()
            part.head.bias.copy_(torch.tensor(logits))
    terms = distiller((IMAGES, torch.zeros(6, dtype=torch.long)), 0.0)
    ensemble = distiller.methods["OnlineEnsemble"].ensemble([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])])
    assert ensemble.tolist() == [[1.0, 0.5]]
    losses = {name: loss.item() for name, loss in terms.losses.items()}
    assert losses["task"] == pytest.approx(0.126928, abs=1e-6)
    assert losses["OnlineEnsemble.ce_students"] == pytest.approx(1.313262, abs=1e-6)
    assert losses["OnlineEnsemble.kl"] == pytest.approx(0.262760 + 0.279080, abs=2e-6)
    assert terms.total().item() == pytest.approx(1.089409, abs=1e-6)


@pytest.mark.parametrize("base_gradient", ["all_students", "pseudo_teacher"])
def test_the_objective_by_hand(base_gradient: str) -> None:
    distiller = built(OnlineEnsemble(students=3, base_gradient=base_gradient))
    method = distiller.methods["OnlineEnsemble"]
    terms = distiller(BATCH, 1.0)
    shared = distiller.student.low(IMAGES)
    given_to = [shared] + 2 * [shared if base_gradient == "all_students" else shared.detach()]
    parts = (distiller.student, *tails(distiller))
    maps = [part.high(x) for part, x in zip(parts, given_to, strict=True)]
    logits = [part.head(x.mean(dim=(2, 3))) for part, x in zip(parts, maps, strict=True)]
    target = (sum(logits) / 3 / 2).softmax(1).detach()
    ce = kl = inter = torch.zeros((), dtype=torch.float64)
    for z in logits:
        log_p = (z / 2).log_softmax(1)
        for n in range(6):
            ce = ce - z[n].log_softmax(0)[LABELS[n]] / 6
            kl = kl + 4 * sum(target[n, c] * (target[n, c].log() - log_p[n, c]) for c in range(3)) / 6
    for own, (adapter,) in zip(maps[1:], method.adapters, strict=True):
        lifted = torch.einsum("oc,nchw->nohw", adapter.weight[:, :, 0, 0], own) + adapter.bias[:, None, None]
        inter = inter + (maps[0].detach() - lifted).square().sum() / lifted.numel()
    torch.testing.assert_close(terms.losses["task"] + terms.losses["OnlineEnsemble.ce_students"], ce)
    torch.testing.assert_close(terms.losses["OnlineEnsemble.inter"], inter)
    torch.testing.assert_close(terms.losses["OnlineEnsemble.kl"], kl)
    whole = 0.7 * ce + 0.15 * inter + 0.15 * kl
    torch.testing.assert_close(terms.total(), whole)
    expected, found = gradients(whole, distiller), gradients(terms.total(), distiller)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_alone_it_is_plain_training_with_a_scaled_loss() -> None:
    distiller = built(OnlineEnsemble(students=1))
    terms = distiller(BATCH, 0.5)
    assert terms.losses["OnlineEnsemble.inter"] == 0
    assert terms.losses["OnlineEnsemble.kl"].abs() < 1e-15
    task = distiller.task.loss(distiller.student(IMAGES), LABELS)
    torch.testing.assert_close(terms.total(), 0.7 * task)
    expected, found = gradients(0.7 * task, distiller), gradients(terms.total(), distiller)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert expected.keys() == found.keys()
    assert distiller.deployables() == {}


def test_without_knowledge_students_train_alone_on_one_base() -> None:
    distiller = built(OnlineEnsemble(students=3, alpha=1.0, beta=0.0, gamma=0.0))
    total = distiller(BATCH, 0.5).total()
    alone = [distiller.task.loss(z, LABELS) for z in answers(distiller)[1]]
    for part, loss in zip((distiller.student, *tails(distiller)), alone, strict=True):
        for own in (part.high, part.head):
            for name, gradient in gradients(loss, own).items():
                torch.testing.assert_close(gradients(total, own)[name], gradient)
    base = [gradients(loss, distiller.student.low)["0.weight"] for loss in alone]
    torch.testing.assert_close(gradients(total, distiller.student.low)["0.weight"], sum(base))


def test_who_learns_from_the_maps() -> None:
    distiller = built(OnlineEnsemble(students=3))
    losses = distiller(BATCH, 0.5).losses
    inter = losses["OnlineEnsemble.inter"]
    assert nothing(inter, distiller.student.high)  # the pseudo teacher's maps are constants
    assert nothing(inter, distiller.student.head)
    assert everything(inter, distiller.student.low)  # through the others
    method = distiller.methods["OnlineEnsemble"]
    for tail, adapters in zip(tails(distiller), method.adapters, strict=True):
        assert everything(inter, tail.high)
        assert nothing(inter, tail.head)
        assert everything(inter, adapters)
        assert all(nothing(loss, adapters) for name, loss in losses.items() if name != "OnlineEnsemble.inter")


def test_the_ensembles_target_is_a_constant() -> None:
    """d (T^2 KL_j) / d z_j = T (softmax(z_j / T) - t) / N and no more, though every student moves t."""
    distiller = built(OnlineEnsemble(students=3))
    before = distiller(BATCH, 0.5).losses["OnlineEnsemble.kl"]
    logits = answers(distiller)[1]
    target = (sum(logits) / 6).softmax(1)
    for part, z in zip((distiller.student, *tails(distiller)), logits, strict=True):
        expected = (2 * ((z / 2).softmax(1) - target) / 6).sum(0)
        torch.testing.assert_close(gradients(before, part.head)["bias"], expected)
    with torch.no_grad():  # whereas its value does change with another student's answers
        tails(distiller)[1].head.bias[0] += 3
    moved = answers(distiller)[1]
    kl = attar.functional.kl_divergence
    ensemble = distiller.methods["OnlineEnsemble"].ensemble
    assert not torch.isclose(kl(moved[0], ensemble(moved), 2.0), kl(logits[0], ensemble(logits), 2.0))


def test_the_base_learns_from_whom_it_should() -> None:
    for base_gradient, reaches in (("all_students", True), ("pseudo_teacher", False)):
        distiller = built(OnlineEnsemble(students=2, base_gradient=base_gradient))
        losses = distiller(BATCH, 0.5).losses
        for term in ("ce_students", "inter"):
            found = everything if reaches else nothing
            assert found(losses[f"OnlineEnsemble.{term}"], distiller.student.low)
        assert everything(losses["OnlineEnsemble.kl"], distiller.student.low)  # the pseudo teacher's own divergence
        assert everything(losses["OnlineEnsemble.ce_students"], tails(distiller)[0])


def test_equal_maps_cost_nothing_and_the_batch_does_not_matter() -> None:
    distiller = built(OnlineEnsemble(students=2))
    ((adapter,),) = distiller.methods["OnlineEnsemble"].adapters
    inter = distiller(BATCH, 0.5).losses["OnlineEnsemble.inter"]
    twice = (IMAGES.repeat(2, 1, 1, 1), LABELS.repeat(2))
    assert inter > 0.01
    torch.testing.assert_close(distiller(twice, 0.5).losses["OnlineEnsemble.inter"], inter)
    with torch.no_grad():  # the pseudo teacher's eight channels are the four of the narrower student, twice
        distiller.student.high[0].weight.copy_(tails(distiller)[0].high[0].weight.repeat(2, 1, 1, 1))
        distiller.student.high[0].bias.copy_(tails(distiller)[0].high[0].bias.repeat(2))
        adapter.weight.copy_(torch.eye(4).repeat(2, 1)[:, :, None, None])
        adapter.bias.zero_()
    assert distiller(BATCH, 0.5).losses["OnlineEnsemble.inter"] < 1e-30


@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-5, 5), order=st.permutations(range(3)), seed=st.integers(0, 99))
def test_what_the_answers_are_added_and_their_order_change_nothing(shift: float, order: list[int], seed: int) -> None:
    logits = list(torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    method = OnlineEnsemble(students=3)

    def kl(answers: list[Tensor]) -> Tensor:
        target = method.ensemble(answers)
        return sum(attar.functional.kl_divergence(z, target, 2.0) for z in answers)

    other = [logits[i] + (shift if i == 1 else 0.0) for i in order]
    torch.testing.assert_close(kl(other), kl(logits))
    assert kl(logits) > 0
    assert kl([logits[0]] * 3).abs() < 1e-12


def test_evaluation_mode_reaches_the_batch_norms_of_every_student() -> None:
    distiller = built(OnlineEnsemble(students=3), batch_norm=True).train()

    def means() -> list[Tensor]:
        norms = [m for m in distiller.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 2 + 2
        return [norm.running_mean.clone() for norm in norms]

    start = means()
    distiller(BATCH, 0.5)
    trained = means()
    assert not any(torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    distiller.eval()
    assert not any(module.training for module in distiller.modules())
    distiller(BATCH, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(trained, means(), strict=True))


def test_every_student_and_the_ensemble_can_be_kept() -> None:
    distiller = built(OnlineEnsemble(students=3), batch_norm=True).train()
    distiller(BATCH, 0.5).total().backward()
    assert list(distiller.deployables()) == [f"OnlineEnsemble.{name}" for name in ("student2", "student3", "ensemble")]
    distiller.eval()
    logits = answers(distiller)[1]
    for j in (2, 3):
        alone = distiller.strip(f"OnlineEnsemble.student{j}")
        torch.testing.assert_close(alone(IMAGES), logits[j - 1], rtol=0, atol=0)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in alone.modules())
    torch.testing.assert_close(distiller.strip(deployable="OnlineEnsemble.ensemble")(IMAGES), sum(logits) / 3)
    torch.testing.assert_close(distiller.strip()(IMAGES), logits[0], rtol=0, atol=0)


def test_four_students_of_falling_width_from_one_run_on_digits(tmp_path: Path) -> None:
    digits = attar.data.open_source("digits", image_size=8)
    pixels = torch.from_numpy(digits.train.pixels[digits.train.rows]).float()
    # Contiguous, since torch's strided 1x1 convolutions of few channels are not safe in channels-last on CPUs.
    images = pixels.movedim(-1, 1).contiguous() / 127.5 - 1
    labels = torch.from_numpy(digits.train.targets).long()
    torch.manual_seed(0)
    student = timm.create_model("cifar_resnet20", num_classes=10, width=0.5)
    distiller = attar.Distiller(student, [OnlineEnsemble(students=4)], attar.Classification(10))
    distiller.build(images[:2]).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for rows in torch.randperm(len(images)).split(32)[:30]:
            distiller((images[rows], labels[rows]), 0.5).total().backward()
            optimizer.step()
            optimizer.zero_grad()
    sizes = []
    for j in (None, 2, 3, 4):
        alone = distiller.strip(None if j is None else f"OnlineEnsemble.student{j}")
        sizes.append(count(alone))
        with torch.no_grad():
            right = (alone(images).argmax(1) == labels).float().mean()
        assert right > 0.25, f"student {j or 1}: {right:.2f}"
        torch.save(alone.state_dict(), tmp_path / "student.pt")
        again = distiller.strip(None if j is None else f"OnlineEnsemble.student{j}", prove_export=False)
        again.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4
    distiller.strip(deployable="OnlineEnsemble.ensemble")


def test_a_run_measures_every_student(tmp_path: Path) -> None:
    options = {"name": "OnlineEnsemble", "options": {"students": 3}}
    result = fit(tiny(options, epochs=1, train_limit=64), tmp_path / "run", console=quiet())
    others = result["deployables"]
    assert list(others) == ["OnlineEnsemble.student2", "OnlineEnsemble.student3", "OnlineEnsemble.ensemble"]
    sizes = [result["parameters"]["deployed"], *(other["parameters"] for other in others.values())]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[3] > sizes[0]
    assert all(0 <= other["test"]["top1"] <= 1 for other in others.values())


def test_adapters_learn_at_half_the_rate() -> None:
    method = built(OnlineEnsemble(students=2)).methods["OnlineEnsemble"]
    rates = {name: method.lr_scale(name) for name, _ in method.named_parameters()}
    assert {name for name, rate in rates.items() if rate == 0.5} == {"adapters.0.0.weight", "adapters.0.0.bias"}
    assert {rate for name, rate in rates.items() if name.startswith("students.")} == {1.0}
    assert OnlineEnsemble(adapter_lr=2.0).lr_scale("adapters.0.0.bias") == 2.0


class Other(attar.Method):
    """Another method that weighs the labels."""

    claims: Mapping[str, str] = {"task weight": "a reason"}


def test_only_one_method_weighs_the_labels() -> None:
    with pytest.raises(AttarError, match=r"both set the task weight \(OnlineEnsemble gives the labels weight 0.7; a r"):
        attar.Distiller(Net(), [OnlineEnsemble(), Other()], attar.Classification(3))
    attar.Distiller(Net(), [OnlineEnsemble(alpha=1.0), Other()], attar.Classification(3))


class Tied(nn.Module):
    """A residual block without a place for a projection: all its channels are added to those of the base."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.high = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.low(images)
        return self.head(self.high(x + self.inner(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize(
    ("student", "cut", "sentence"),
    [
        (
            Tied(),
            "low",
            r"cannot make 'high' of Tied behind 'low' narrower, since its 8 channels hang together",
        ),
        (Net(), "high", r"finds no stage of Net behind 'high': cut at an earlier one"),
        (Net(), "hihg", r"'hihg': did you mean 'high'"),
        (
            timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, patch_size=4, depth=4),
            None,
            r"VisionTransformer behind 'blocks\.0' contains attention and cannot be made narrower",
        ),
    ],
)
def test_what_cannot_be_narrowed_is_refused(student: nn.Module, cut: str | None, sentence: str) -> None:
    method = OnlineEnsemble(students=2, cut=cut)
    distiller = attar.Distiller(student, [method], attar.Classification(3), stages=["low", "high"] if cut else None)
    with pytest.raises(AttarError, match=sentence):
        distiller.build(IMAGES.float())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"students": 0}, "at least one student, the network itself, not 0"),
        ({"temperature": 0.0}, "temperature must be positive, not 0.0"),
        ({"base_gradient": "base"}, "'all_students' or 'pseudo_teacher', not 'base'"),
        ({"adapter_lr": 0.0}, "adapter_lr must be positive"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        OnlineEnsemble(**options)
