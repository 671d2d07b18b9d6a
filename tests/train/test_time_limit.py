"""The schedule under a time limit, by a clock that the test moves."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from veneer.train import trainer

STEPS = 100


def run(monkeypatch: pytest.MonkeyPatch, times: Any, minutes: float = 1.0, between: Any = None) -> tuple[Any, Any, Any]:
    """The learning rate of every step taken, the scheduler at the end, and the callback; times(i) in seconds."""
    now = [5.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    limit = trainer.TimeLimit(minutes)
    args = SimpleNamespace(device=torch.device("cpu"), world_size=1)
    state = SimpleNamespace(max_steps=STEPS, global_step=0)
    control = SimpleNamespace(should_training_stop=False)
    limit.on_train_begin(args, state, control)
    rates = []
    while state.global_step < STEPS and not control.should_training_stop:
        limit.on_step_begin(args, state, control)
        now[0] += times(state.global_step)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        state.global_step += 1
        limit.on_step_end(args, state, control, lr_scheduler=scheduler)
        assert scheduler.last_epoch <= STEPS
        now[0] += between(state.global_step) if between else 0.0
    assert all(a >= b for a, b in itertools.pairwise(rates)), "the rate of a cosine never rises"
    return rates, scheduler, limit


def test_a_slow_first_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    free, _, _ = run(monkeypatch, lambda i: 0.1, minutes=99)
    rates, scheduler, limit = run(monkeypatch, lambda i: 24.0 if i == 0 else 0.2)
    assert rates == free
    assert scheduler.last_epoch == STEPS
    assert not limit.reached


def test_a_slow_step_in_between_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    free, _, _ = run(monkeypatch, lambda i: 0.1, minutes=99)
    assert run(monkeypatch, lambda i: 24.0 if i == 40 else 0.2)[0] == free


@pytest.mark.parametrize("seconds", [0.7, 1.0, 4.0, 13.0])
def test_a_run_that_is_too_slow_comes_down_in_time(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    rates, _, limit = run(monkeypatch, lambda i: seconds)
    assert limit.reached
    assert len(rates) == int(60 / seconds) + 1, "the step during which time is up is the last"
    assert rates[-1] < 0.1


def test_a_run_that_gets_fast_again_stays_down(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, scheduler, limit = run(monkeypatch, lambda i: 2.0 if i < 25 else 0.1)
    assert not limit.reached
    assert len(rates) == STEPS
    assert scheduler.last_epoch <= STEPS


def test_evaluation_between_steps_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, _, limit = run(monkeypatch, lambda i: 0.2, between=lambda step: 10.0 if step % 10 == 0 else 0.0)
    assert limit.reached
    assert rates[-1] < 0.2
