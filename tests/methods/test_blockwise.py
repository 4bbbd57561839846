"""Blockwise: pressure, control, removal and recovery as its card defines them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
import widths
from attar.errors import AttarError
from attar.methods import KD, ONE, Blockwise, Supervised
from networks import Net

IMAGES = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def network(seed: int = 0) -> nn.Module:
    """A quarter-width ResNet-20 (4, 8, 16 channels) whose batch norms look trained."""
    torch.manual_seed(seed)
    return widths.stirred(timm.create_model("cifar_resnet20", num_classes=3, width=0.25).double(), seed)


def built(*others: attar.Method, student: nn.Module | None = None, **options: Any) -> attar.Distiller:
    torch.manual_seed(1)
    student = network() if student is None else student
    method = Blockwise(copy.deepcopy(student), **options)
    return attar.Distiller(student, [method, *others], attar.Classification(3)).build(IMAGES).train()


def blockwise(distiller: attar.Distiller) -> Blockwise:
    method = distiller.methods["Blockwise"]
    assert isinstance(method, Blockwise)
    return method


def gradients(distiller: attar.Distiller, progress: float = 0.5) -> dict[str, Tensor]:
    distiller.zero_grad(set_to_none=True)
    distiller((IMAGES, LABELS), progress).total().backward()
    return {name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None}


def shrunk(distiller: attar.Distiller) -> attar.Distiller:
    distiller.enter(None)
    assert distiller.reshape()
    return distiller.train()


# Structure learning


def test_the_pressure_is_the_cost_weighted_sum_of_the_largest_scales() -> None:
    distiller = built()
    structure = widths.channel_groups(distiller.student, IMAGES)
    cost = structure.cost(widths.whole(structure), "macs")
    scales = widths.scales(structure, distiller.student)
    total = sum(
        structure.marginal(widths.whole(structure), number, "macs") / cost * sum(known)
        for number, known in enumerate(scales)
    )
    found = sum(float(blockwise(distiller).pressure(block)) for block in range(3))
    assert found == pytest.approx(total, rel=1e-6)
    assert total > 0


def test_the_pressure_of_a_block_reaches_only_its_scales_and_doubles_with_its_strength() -> None:
    distiller = built(alpha=0.0)
    method = blockwise(distiller)
    norms = {f"{path}.weight" for path, m in distiller.student.named_modules() if isinstance(m, nn.BatchNorm2d)}
    reached = []
    for block in range(3):
        distiller.zero_grad(set_to_none=True)
        method.pressure(block).backward()
        moved = [name for name, p in distiller.student.named_parameters() if p.grad is not None and p.grad.any()]
        reached.append(set(moved))
    # The stem writes into the residual sum of the first stage; of tied norms some may never be the largest.
    for block, prefixes in enumerate((("layer1", "bn1"), ("layer2",), ("layer3",))):
        own = {name for name in norms if name.startswith(prefixes)}
        assert {name for name in own if "bn1" in name and name != "bn1.weight"} <= reached[block] <= own
    distiller.enter(0)
    runs = []
    for strength in (0.0, 1.0, 2.0):
        method.strengths[1] = strength
        runs.append(gradients(distiller))
    for name in runs[0]:
        once, twice = runs[1][name] - runs[0][name], runs[2][name] - runs[0][name]
        torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=1e-9)
        assert bool(once.any()) == (name.removeprefix("student.") in reached[1])


def test_only_the_largest_of_tied_norms_is_pressed_and_in_proportion_to_the_price() -> None:
    distiller = built()
    method = blockwise(distiller)
    distiller.zero_grad(set_to_none=True)
    torch.stack([method.pressure(block) for block in range(3)]).sum().backward()
    structure = widths.channel_groups(distiller.student, IMAGES)
    for number, group in enumerate(structure.groups):
        norms = [distiller.student.get_submodule(gate.module) for gate in group.gates]
        pressed = torch.stack([norm.weight.grad for norm in norms])  # type: ignore[misc]
        largest = torch.stack([norm.weight.abs() for norm in norms]).argmax(dim=0)  # type: ignore[operator]
        signs = torch.stack([norm.weight.sign() for norm in norms])  # type: ignore[operator]
        expected = torch.zeros_like(pressed)
        expected[largest, range(group.channels)] = 1.0
        torch.testing.assert_close(pressed, method.prices[number] * expected * signs)


def test_strengths_follow_the_budget_and_change_by_a_factor_of_two_at_most() -> None:
    distiller = built(budget=0.5, structure=0.5, warmup=0.0)
    method = blockwise(distiller)
    method.epoch_start(0, 10)
    assert method.strengths.tolist() == [1.0, 1.0, 1.0]
    method.epoch_start(1, 10)  # everything is alive: exp(5 (1 - 0.5)) is more than 2
    assert method.strengths.tolist() == [2.0, 2.0, 2.0]
    structure = widths.channel_groups(distiller.student, IMAGES)
    structure.mask_(distiller.student, [range(1)] * len(structure.groups))
    cost = structure.cost([1] * len(structure.groups), "macs") / structure.cost(widths.whole(structure), "macs")
    method.epoch_start(2, 10)
    assert 5 * (cost - 0.5) < -0.7
    assert method.strengths.tolist() == [1.0, 1.0, 1.0]
    method.epoch_start(5, 10)  # the phase is over
    assert method.strengths.tolist() == [1.0] * 3
    # Close to the budget the factor is the exponential itself.
    method.budget = cost + 0.05
    method.epoch_start(3, 10)
    assert method.strengths.tolist() == pytest.approx([torch.tensor(-0.25).exp().item()] * 3, rel=1e-5)


def test_strengths_of_blocks_follow_their_own_budgets() -> None:
    distiller = built(block_budgets=(0.9, 0.6, 0.6), block_strengths=(0.0, 1.0, 2.0), structure=0.5, rate=1.0)
    method = blockwise(distiller)
    method.epoch_start(1, 10)
    # Nearly everything is alive, so that the blocks exceed their budgets by 0.1, 0.4 and 0.4.
    factor = torch.tensor(0.4).exp().item()
    assert method.strengths.tolist() == pytest.approx([0.0, factor, 2 * factor], rel=0.05)
    method.strengths.fill_(1.0)
    method.epoch_start(1, 10)
    assert method.strengths.tolist() == pytest.approx([torch.tensor(0.1).exp().item(), factor, factor], rel=0.05)


def test_channels_are_priced_anew_when_others_have_died() -> None:
    distiller = built()
    method = blockwise(distiller)
    before = method.prices.clone()
    structure = widths.channel_groups(distiller.student, IMAGES)
    structure.mask_(distiller.student, [range(count // 2) for count in widths.whole(structure)])
    method.epoch_start(0, 10)
    assert (method.prices < before).all()
    assert (method.prices > 0).all()


def test_strength_rises_over_the_warm_up() -> None:
    method = blockwise(built(structure=0.5, warmup=0.5))
    risen = []
    for epoch in range(6):
        method.epoch_start(epoch, 16)
        risen.append(float(method.warm))
    assert risen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_without_its_terms_every_step_is_plain_training_to_the_last_bit() -> None:
    distiller = built(strength=0.0, alpha=0.0, block_weight=0.0)
    torch.manual_seed(1)
    plain = attar.Distiller(network(), [], attar.Classification(3)).build(IMAGES).train()
    expected = gradients(plain)
    for phase in (0, None):
        distiller.enter(phase)
        found = gradients(distiller)
        assert {name for name in found if name.startswith("student.")} == set(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_phase_has_labels_answer_and_pressure_with_their_weights() -> None:
    distiller = built(alpha=0.25, block_strengths=(0.5, 1.0, 2.0))
    distiller.enter(0)
    terms = distiller((IMAGES, LABELS), 0.1)
    assert {name: float(weight) for name, weight in terms.weights.items()} == {
        "Blockwise.ce": 0.75,
        "Blockwise.kl": 0.25,
        "Blockwise.structure.layer1": 0.5,
        "Blockwise.structure.layer2": 1.0,
        "Blockwise.structure.layer3": 2.0,
    }


# Removal


def test_the_student_shrinks_in_place_and_answers_as_before() -> None:
    student = network()
    for module in student.modules():  # switch something off for the reshape to find
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight[::3] *= 1e-4
    distiller = built(student=student, min_channels=2, divisor=2)
    # An optimiser of before would hold on to parameters that are no longer the student's.
    old = {id(parameter) for parameter in student.parameters()}
    keys = list(student.state_dict())
    assert distiller.may_reshape
    shrunk(distiller)
    assert not distiller.may_reshape
    assert not distiller.reshape()
    assert distiller.student is student
    assert list(student.state_dict()) == keys
    assert any(id(parameter) not in old for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    cost = widths.counted(network(), "macs", 16)
    assert 0.98 * 0.5 * cost <= widths.counted(student, "macs", 16) <= 0.5 * cost
    stripped = distiller.strip(prove_export=False)
    assert type(stripped) is type(network())
    assert sum(p.numel() for p in stripped.parameters()) < sum(p.numel() for p in network().parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in stripped.modules())
    inplace = {path for path, module in stripped.named_modules() if getattr(module, "inplace", False)}
    assert inplace == {path for path, module in network().named_modules() if getattr(module, "inplace", False)}


def test_logits_stay_when_channels_that_are_off_are_removed() -> None:
    distiller = built(min_channels=2, divisor=2)
    method = blockwise(distiller)
    before: dict[str, Tensor] = {}
    reshape = method.reshape

    def watched(student: nn.Module) -> Any:
        kept = reshape(student)
        before["logits"] = student.eval()(IMAGES).detach()
        return kept

    method.reshape = watched  # type: ignore[method-assign]
    shrunk(distiller)
    after = distiller.student.eval()(IMAGES)
    torch.testing.assert_close(after, before["logits"], rtol=0, atol=1e-12)
    masked = before["logits"].float()
    torch.testing.assert_close(copy.deepcopy(distiller.student).float()(IMAGES.float()), masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("resource", ["macs", "params"])
def test_budgets_are_monotonic_and_one_keeps_all(resource: Any) -> None:
    costs = []
    for budget in (0.3, 0.5, 0.52, 0.7, 1.0):
        distiller = built(budget=budget, resource=resource, min_channels=2, divisor=2)
        distiller.enter(None)
        assert distiller.reshape() == (budget < 1.0)
        costs.append(widths.counted(distiller.student, resource, 16))
        assert costs[-1] <= budget * widths.counted(network(), resource, 16)
    assert costs == sorted(costs)
    assert costs[-1] == widths.counted(network(), resource, 16)


def test_a_removal_that_changes_the_answer_is_refused() -> None:
    distiller = built(min_channels=2, divisor=2)
    method = blockwise(distiller)
    reshape = method.reshape

    def forgetful(student: nn.Module) -> Any:
        state = copy.deepcopy(student.state_dict())
        kept = reshape(student)
        student.load_state_dict(state)  # nothing is switched off
        return kept

    method.reshape = forgetful  # type: ignore[method-assign]
    distiller.enter(None)
    with pytest.raises(AttarError, match="without the channels that were switched off does not give the same logits"):
        distiller.reshape()


def test_lists_of_kept_channels_rebuild_the_shape() -> None:
    first, second = shrunk(built(min_channels=2, divisor=2)), built(min_channels=2, divisor=2)
    assert first.kept is not None
    assert second.reshape(first.kept)
    second.load_state_dict(first.state_dict())
    first.train(), second.train()
    one, other = gradients(first), gradients(second)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_it_happens_when_the_main_training_begins() -> None:
    distiller = built(min_channels=2, divisor=2, structure=0.4)
    happened = []
    for epoch in range(5):
        distiller.epoch_start(epoch, 5)
        happened.append(distiller.reshape())
    assert happened == [False, False, True, False, False]


# Recovery


def test_adapters_are_where_widths_differ_and_nowhere_in_the_student() -> None:
    distiller = built(min_channels=2, divisor=2)
    assert not list(blockwise(distiller).parameters())
    shrunk(distiller)
    teacher = blockwise(distiller).teachers[0].network
    for stage, adapter in zip(distiller.anatomy.stages, blockwise(distiller).adapters, strict=True):
        wanted = teacher.get_submodule(f"{stage.name}.0.bn2").num_features
        if stage.channels == wanted:
            assert isinstance(adapter, nn.Identity)
        else:
            assert adapter.weight.shape == (wanted, stage.channels, 1, 1)
    assert any(isinstance(adapter, nn.Conv2d) for adapter in blockwise(distiller).adapters)
    found = gradients(distiller)
    assert found.keys() == {name for name, _ in distiller.named_parameters()}
    assert not any("adapter" in key for key in distiller.strip(prove_export=False).state_dict())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.floats(0.01, 100.0))
def test_the_distance_is_one_for_zeros_zero_for_the_teachers_map_and_has_no_scale(seed: int, scale: float) -> None:
    method = Blockwise(nn.Identity())
    draw = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    assert float(method.distance(torch.zeros_like(theirs), theirs)) == pytest.approx(1.0)
    assert float(method.distance(theirs, theirs)) == 0.0
    expected = float((ours - theirs).square().mean() / theirs.square().mean())
    assert float(method.distance(scale * ours, scale * theirs)) == pytest.approx(expected)


def test_no_gradient_reaches_the_teachers_map_and_dead_maps_are_finite() -> None:
    method = Blockwise(nn.Identity())
    ours, theirs = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    method.distance(ours, theirs).backward()
    assert theirs.grad is None
    assert ours.grad is not None
    assert float(method.distance(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2))) == 0.0


def test_a_copy_of_the_teacher_has_no_distance_and_the_teacher_never_changes() -> None:
    student = network()
    distiller = built(student=student)
    teacher = blockwise(distiller).teachers[0].network
    before = copy.deepcopy(teacher.state_dict())
    distiller.eval()
    losses = distiller((IMAGES, LABELS), 0.5).losses
    assert {name for name in losses if ".block." in name} == {f"Blockwise.block.layer{n}" for n in (1, 2, 3)}
    assert all(float(loss) == pytest.approx(0.0, abs=1e-12) for name, loss in losses.items() if name != "task")
    shrunk(distiller)
    gradients(distiller)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())


def test_matching_all_at_once_one_after_another_or_not_at_all() -> None:
    def on(match: Any, progress: float) -> list[float]:
        method = blockwise(built(match=match, structure=0.25, block_weights=(1.0, 2.0, 3.0)))
        weights = method.weights(torch.tensor(progress))
        return [float(weights[f"block.layer{number}"]) for number in (1, 2, 3) if f"block.layer{number}" in weights]

    assert on("joint", 0.25) == [1.0, 2.0, 3.0]
    assert on("none", 0.25) == []
    assert [on("progressive", progress) for progress in (0.0, 0.25, 0.49, 0.51, 0.74, 0.76, 1.0)] == [
        *[[1.0, 0.0, 0.0]] * 3,
        *[[1.0, 2.0, 0.0]] * 2,
        *[[1.0, 2.0, 3.0]] * 2,
    ]


def test_other_methods_are_built_anew_for_the_smaller_student() -> None:
    distiller = built(ONE(branches=2), min_channels=2, divisor=2)
    shrunk(distiller)
    found = gradients(distiller)
    assert any(name.startswith("methods.ONE.tails") for name in found)
    tail = sum(p.numel() for name, p in distiller.named_parameters() if name.startswith("methods.ONE.tails"))
    assert tail < sum(p.numel() for p in built(ONE(branches=2)).methods["ONE"].tails.parameters())  # type: ignore[union-attr]
    assert {"Blockwise.block.layer1", "ONE.kl", "task"} <= distiller((IMAGES, LABELS), 0.5).losses.keys()
    assert "ONE.ensemble" in distiller.deployables()


def test_blocks_may_be_any_modules_and_the_teacher_another_network() -> None:
    distiller = built(blocks=("layer1.1", "layer3"), block_strengths=(1.0, 0.0), min_channels=2, divisor=2)
    assert "Blockwise.block.layer1.1" in shrunk(distiller)((IMAGES, LABELS), 0.5).losses
    torch.manual_seed(0)
    other = timm.create_model("cifar_resnet20", num_classes=3, width=0.5).double()
    method = Blockwise(other, min_channels=2, divisor=2)
    distiller = attar.Distiller(network(), [method], attar.Classification(3)).build(IMAGES).train()
    assert [adapter.out_channels for adapter in method.adapters] == [8, 16, 32]
    gradients(distiller)


# Refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"budget": 1.5}, "above 0 and at most 1, not 1.5"),
        ({"block_budgets": (0.5, 0.0, 1.0)}, "above 0 and at most 1, not 0.0"),
        ({"resource": "watts"}, "resource is one of macs, params, not 'watts'"),
        ({"match": "some"}, "match is one of joint, progressive, none, not 'some'"),
        ({"scope": "us"}, "scope is one of world, rank, not 'us'|scope is one of rank, world, not 'us'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"alpha": 1.1}, "alpha is a share between 0 and 1"),
        ({"structure": -0.1}, "structure is a share between 0 and 1"),
        ({"min_channels": 0}, "min_channels and divisor are at least 1"),
        ({"block_strengths": (1.0,)}, r"block_strengths has 1 values for 3 blocks \(layer1, layer2, layer3\)"),
        ({"block_weights": (1.0,) * 4}, "block_weights has 4 values for 3 blocks"),
        ({"block_budgets": (0.5,)}, "block_budgets has 1 values for 3 blocks"),
        ({"budget": 0.05}, r"A budget of 0.05 of the macs cannot be met, since 0.\d\d are left"),
        ({"blocks": ("layer9",)}, "did you mean 'layer1'|There is no stage or module 'layer9'"),
    ],
)
def test_refused_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(AttarError, match=said):
        built(**options)


def test_refused_networks_teachers_and_companions() -> None:
    with pytest.raises(AttarError, match="Net has no batch norm"):
        attar.Distiller(Net(), [Blockwise(Net())], attar.Classification(3)).build(IMAGES.float())
    # With nothing to remove there is nothing to refuse.
    attar.Distiller(Net(), [Blockwise(Net(), budget=1.0)], attar.Classification(3)).build(IMAGES.float())
    with pytest.raises(AttarError, match="Blockwise has one teacher, usually the trained network itself, not 2"):
        Blockwise([network(), network()])
    student = network()
    with pytest.raises(AttarError, match="teacher is the student itself"):
        attar.Distiller(student, [Blockwise(student)], attar.Classification(3)).build(IMAGES)
    with pytest.raises(AttarError, match="both set the task weight"):
        attar.Distiller(network(), [Blockwise(network()), KD(network())], attar.Classification(3))
    wrong = timm.create_model("cifar_resnet20", num_classes=4, width=0.25).double()
    distiller = attar.Distiller(network(), [Blockwise(wrong)], attar.Classification(3))
    with pytest.raises(AttarError, match=r"\[2, 4\]|4 classes"):
        distiller.build(IMAGES)


def test_no_other_method_may_have_phases() -> None:
    class Warm(Supervised):
        @property
        def phases(self) -> tuple[attar.method.Phase, ...]:
            return (attar.method.Phase("warm", 0.1),)

    with pytest.raises(AttarError, match="Blockwise changes the student's widths and Warm trains in phases before"):
        built(Warm())
