"""One of several per step: uniform, seeded, a function of the step alone, also where a compiler is in between."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from attar.draws import Draws, drawn


def test_uniform_and_without_memory() -> None:
    steps = 6000
    numbers = [drawn(3, step, 3) for step in range(steps)]
    for count in Counter(numbers).values():
        assert abs(count - steps / 3) < 4 * (steps * 2 / 9) ** 0.5
    pairs = Counter(itertools.pairwise(numbers))
    assert len(pairs) == 9
    for count in pairs.values():
        assert abs(count - steps / 9) < 5 * (steps * 8 / 81) ** 0.5


def test_the_draws_are_these_ones_for_ever() -> None:
    """A run that is resumed by a later version draws on."""
    assert [drawn(0, step, 5) for step in range(12)] == [2, 4, 0, 1, 0, 2, 2, 1, 1, 2, 0, 4]
    assert [drawn(1, step, 5) for step in range(12)] != [drawn(0, step, 5) for step in range(12)]


def test_draws_follow_the_steps_and_can_be_set() -> None:
    draws = Draws(4, seed=7)
    seen = []
    answer = torch.randn(2, 3)
    for _ in range(20):
        seen.append(draws.current)
        copied = draws.advance(answer)
        assert torch.equal(copied, answer)
        assert copied.data_ptr() != answer.data_ptr()
    assert seen == [drawn(7, step, 4) for step in range(20)]
    draws.go_to(5)
    assert (draws.step, draws.current) == (5, seen[5])


class Panel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.draws = Draws(3)
        self.student = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            answer = x + 10.0 * self.draws.current
        return self.student(x).sum() * 0.0 + self.draws.advance(answer).mean()


def test_a_compiled_step_draws_too() -> None:
    torch._dynamo.reset()
    panel, x = Panel(), torch.zeros(1, 2)
    counting = CompileCounterWithBackend("aot_eager")
    step = torch.compile(panel, fullgraph=True, backend=counting)
    for number in range(12):
        loss = step(x)
        loss.backward()
        assert loss.item() == 10.0 * drawn(0, number, 3), number
    assert counting.frame_count == 3
