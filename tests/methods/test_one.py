from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.functional import gated_logits, kl_divergence
from attar.methods import ONE
from attar.methods.one import Gate
from networks import IMAGES, LABELS, Net


def built(method: ONE, seed: int = 0, batch_norm: bool = False) -> attar.Distiller:
    torch.manual_seed(seed)
    distiller = attar.Distiller(Net(batch_norm=batch_norm), [method], attar.Classification(3))
    return distiller.double().build(IMAGES)


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True), strict=True))


def test_worked_example() -> None:
    gate = torch.softmax(torch.relu(torch.tensor([[1.0, -0.5, 0.2]], dtype=torch.float64)), 1)
    torch.testing.assert_close(gate, torch.tensor([[0.550295, 0.202442, 0.247263]]).double(), atol=1e-6, rtol=0)
    z = [torch.tensor([row], dtype=torch.float64) for row in ((2, 0, -1), (1, 1, 0), (0, 2, 1))]
    mixed = gated_logits(z, gate)
    torch.testing.assert_close(mixed, torch.tensor([[1.303031, 0.696969, -0.303031]]).double(), atol=1e-6, rtol=0)
    ce = attar.Classification(3).loss
    label = torch.tensor([0])
    cross = [ce(x, label).item() for x in z]
    assert cross == pytest.approx([0.169846, 0.861995, 2.407606], abs=1e-6)
    assert ce(mixed, label).item() == pytest.approx(0.557425, abs=1e-6)
    kl = [kl_divergence(x, mixed, 3).item() for x in z]
    assert kl == pytest.approx([0.240145, 0.044054, 0.765015], abs=1e-6)
    shifted = [kl_divergence(x, mixed, 3, shift=1e-7).item() for x in z]
    assert shifted == pytest.approx([0.240148, 0.044057, 0.765018], abs=1e-6)
    hard = sum(cross) + ce(mixed, label).item()
    assert hard + sum(kl) == pytest.approx(5.046087, abs=2e-6)
    weight = ONE(ramp=80 / 300).weights(torch.tensor(0.0, dtype=torch.float64))["kl"]
    assert hard + float(weight) * sum(kl) == pytest.approx(4.003942, abs=2e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(3, 0.765015), (30, 0.756512), (1000, 0.754677)])
def test_high_temperature_limit(temperature: float, expected: float) -> None:
    mixed = torch.tensor([[1.303031, 0.696969, -0.303031]], dtype=torch.float64)
    z = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    assert kl_divergence(z, mixed, temperature).item() == pytest.approx(expected, abs=2e-6)
    d = mixed - z
    limit = ((d - d.mean()) ** 2).sum().item() / 6
    assert limit == pytest.approx(0.754618, abs=2e-6)
    assert kl_divergence(z, mixed, 1e3).item() == pytest.approx(limit, rel=0.01)


def test_gate_rows_and_floor() -> None:
    gate = Gate(4, 3, batch_norm=False)
    rows = gate(torch.randn(5, 4, 2, 2))
    torch.testing.assert_close(rows.sum(1), torch.ones(5))
    assert (rows > 0).all()
    with torch.no_grad():
        gate.linear.weight.zero_()
        gate.linear.bias.copy_(torch.tensor([-9.0, 2.0, 2.0]))
    floor = gate(torch.zeros(1, 4, 1, 1))[0, 0].item()
    assert floor == pytest.approx(1 / (1 + 2 * torch.e**2), rel=1e-5)
    with torch.no_grad():
        gate.linear.bias.fill_(-1.0)
    torch.testing.assert_close(gate(torch.zeros(1, 4, 1, 1)), torch.full((1, 3), 1 / 3))


def test_a_training_batch_of_one_uses_running_statistics() -> None:
    gate = Gate(4, 3).train()
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    one = gate(torch.randn(1, 4, 2, 2))
    assert torch.isfinite(one).all()
    torch.testing.assert_close(one.sum(), torch.tensor(1.0))
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())
    terms = built(ONE()).train()((IMAGES[:1], LABELS[:1]), 1.0)
    assert torch.isfinite(terms.total())


def test_distillation_never_reaches_the_gate() -> None:
    distiller = built(ONE())
    terms = distiller((IMAGES, LABELS), 1.0)
    method = distiller.methods["ONE"]
    assert all(g is None or not g.any() for g in gradients(terms.losses["ONE.kl"], method.gate).values())
    for part in (method.gate.linear, method.tails, distiller.student.low, distiller.student.high):
        found = gradients(terms.losses["ONE.ce_ensemble"], part)
        assert any(g is not None and g.abs().max() > 0 for g in found.values())
    for part in (method.tails, distiller.student.low, distiller.student.high):
        found = gradients(terms.losses["ONE.kl"], part)
        assert all(g is not None and g.abs().max() > 0 for g in found.values())


def test_target_is_a_constant() -> None:
    """The gradient of the KL equals the one with the ensemble computed beforehand and frozen."""
    distiller = built(ONE(target_shift=0.0))
    method = distiller.methods["ONE"]
    terms = distiller((IMAGES, LABELS), 1.0)
    low = distiller.student.low(IMAGES)
    logits = [distiller.student(IMAGES), *(tail(low) for tail in method.tails)]
    frozen = method.ensemble(logits, low).detach()
    by_hand = torch.stack([kl_divergence(z, frozen, 3.0) for z in logits]).sum()
    torch.testing.assert_close(by_hand, terms.losses["ONE.kl"])
    expected, found = gradients(by_hand, distiller.student), gradients(terms.losses["ONE.kl"], distiller.student)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_identical_branches_have_nothing_to_teach() -> None:
    distiller = built(ONE())
    method = distiller.methods["ONE"]
    for tail in method.tails:
        tail.load_state_dict(method._split[0].tail.state_dict())
    terms = distiller((IMAGES, LABELS), 1.0)
    low = distiller.student.low(IMAGES)
    logits = [distiller.student(IMAGES), *(tail(low) for tail in method.tails)]
    torch.testing.assert_close(method.ensemble(logits, low), logits[0])
    assert terms.losses["ONE.kl"].item() < 1e-5
    for gradient in gradients(terms.losses["ONE.kl"], method.tails).values():
        assert gradient is None or gradient.abs().max() < 1e-5


def test_without_distillation_it_is_branches_under_cross_entropy() -> None:
    distiller = built(ONE(kl_weight=0.0, gate="mean"))
    method = distiller.methods["ONE"]
    terms = distiller((IMAGES, LABELS), 1.0)
    ce = distiller.task.loss
    low = distiller.student.low(IMAGES)
    logits = [distiller.student(IMAGES), *(tail(low) for tail in method.tails)]
    by_hand = sum(ce(z, LABELS) for z in logits) + ce(torch.stack(logits).mean(0), LABELS)
    torch.testing.assert_close(terms.total(), by_hand)
    expected, found = gradients(by_hand, distiller), gradients(terms.total(), distiller)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_one_branch_is_twice_plain_training() -> None:
    distiller = built(ONE(branches=1))
    terms = distiller((IMAGES, LABELS), 1.0)
    torch.testing.assert_close(terms.losses["ONE.ce_ensemble"], terms.losses["task"])
    assert terms.losses["ONE.ce_branches"] == 0
    plain = attar.Classification(3).loss(distiller.student(IMAGES), LABELS)
    torch.testing.assert_close(terms.total(), 2 * plain, rtol=1e-6, atol=1e-6)


def test_adding_a_constant_to_all_logits_changes_nothing() -> None:
    distiller = built(ONE())
    before = distiller((IMAGES, LABELS), 1.0)
    with torch.no_grad():
        distiller.student.head.bias.add_(2.5)
        for tail in distiller.methods["ONE"].tails:
            tail.head.bias.add_(2.5)
    after = distiller((IMAGES, LABELS), 1.0)
    for name, loss in before.losses.items():
        torch.testing.assert_close(after.losses[name], loss, msg=name)


def test_permuting_branches_with_their_gates_changes_nothing() -> None:
    distiller = built(ONE(gate_norm=False))
    method = distiller.methods["ONE"]
    before = distiller((IMAGES, LABELS), 1.0).total()
    with torch.no_grad():
        order = [0, 2, 1]
        method.gate.linear.weight.copy_(method.gate.linear.weight[order])
        method.gate.linear.bias.copy_(method.gate.linear.bias[order])
    method.tails = nn.ModuleList(reversed(method.tails))
    torch.testing.assert_close(distiller((IMAGES, LABELS), 1.0).total(), before)


def test_branches_are_redrawn_from_the_layers_own_distribution() -> None:
    distiller = built(ONE())
    own = dict(distiller.student.named_parameters())
    for tail in distiller.methods["ONE"].tails:
        for name, parameter in tail.named_parameters():
            assert not torch.equal(parameter, own[name]), name
            assert torch.equal(parameter.flatten().sort().values, own[name].flatten().sort().values), name
    first, second = distiller.methods["ONE"].tails
    assert not torch.equal(first.head.weight, second.head.weight)


@pytest.mark.parametrize("progress", [0.0, 40 / 300, 79 / 300, 80 / 300, 1.0])
def test_ramp_weight(progress: float) -> None:
    epoch = progress * 300
    expected = torch.exp(torch.tensor(-5.0 * (1 - min(epoch, 80) / 80) ** 2)).item()
    code, paper = ONE(), ONE(variant="paper")
    p = torch.tensor(progress)
    assert float(code.weights(p)["kl"]) == pytest.approx(expected, rel=1e-5)
    assert float(paper.weights(p)["kl"]) == 1.0
    assert (code.target_shift, paper.target_shift) == (1e-7, 0.0)
    terms = built(ONE())((IMAGES, LABELS), p)
    assert float(terms.weights["ONE.kl"]) == pytest.approx(expected, rel=1e-5)


def test_published_sizes() -> None:
    """One.md: ResNet-32 on 100 classes trains 1,193,189 parameters for 472,756; the gate holds 105."""
    import timm

    import attar.zoo

    for name, plain, whole, gate in (
        ("cifar_resnet32", 472_756, 1_193_189, 105),
        ("cifar_resnet110_bottleneck", 1_727_284, 4_363_653, 393),
    ):
        student = timm.create_model(name, num_classes=100)
        distiller = attar.Distiller(student, [ONE()], attar.Classification(100)).build(torch.zeros(2, 3, 32, 32))
        assert sum(p.numel() for p in student.parameters()) == plain
        assert sum(p.numel() for p in distiller.parameters()) == whole
        assert sum(p.numel() for p in distiller.methods["ONE"].gate.parameters()) == gate


def test_native_ensemble_is_the_gated_mixture() -> None:
    distiller = built(ONE(), batch_norm=True).train()
    distiller((IMAGES, LABELS), 1.0).total().backward()
    ensemble = distiller.strip(deployable="ONE.ensemble")
    distiller.eval()
    method = distiller.methods["ONE"]
    low = distiller.student.low(IMAGES)
    logits = [distiller.student(IMAGES), *(tail(low) for tail in method.tails)]
    torch.testing.assert_close(ensemble(IMAGES), method.ensemble(logits, low))
    assert not any(module.training for module in ensemble.modules())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"branches": 0}, "at least one branch"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"ramp": 1.5}, "between 0 and 1"),
        ({"variant": "thesis"}, "'code' or 'paper'"),
        ({"gate": "median"}, "'learned' or 'mean'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        ONE(**options)


def test_an_unknown_cut_names_the_nearest() -> None:
    with pytest.raises(AttarError, match="did you mean 'low'"):
        built(ONE(cut="lew"))


def test_a_cut_with_nothing_behind_it_is_refused() -> None:
    distiller = attar.Distiller(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), [
        ONE(cut="0")], attar.Classification(3), stages=["0"])  # fmt: skip
    with pytest.raises(AttarError, match="No layer lies behind"):
        distiller.build(torch.zeros(2, 3, 8, 8))


def test_an_explicit_tail() -> None:
    class Head(nn.Module):
        def __init__(self, net: Net) -> None:
            super().__init__()
            self.high, self.head = net.high, net.head

        def forward(self, low: Tensor) -> Tensor:
            return self.head(self.high(low).mean(dim=(2, 3)))

    torch.manual_seed(0)
    net = Net().double()
    given = attar.Distiller(net, [ONE(cut="low", tail=Head(net))], attar.Classification(3)).build(IMAGES)
    assert len(list(given.methods["ONE"].named_parameters())) == 2 * 4 + 4
    terms = given((IMAGES, LABELS), 1.0)
    terms.total().backward()
    assert all(parameter.grad is not None for parameter in given.parameters())

    wrong = Head(net)
    wrong.forward = lambda low: wrong.head(wrong.high(low).amax(dim=(2, 3)))  # type: ignore[method-assign]
    with pytest.raises(AttarError, match="do not equal the whole"):
        attar.Distiller(net, [ONE(cut="low", tail=wrong)], attar.Classification(3)).build(IMAGES)
