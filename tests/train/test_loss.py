from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import chat_rows

from veneer.train.batches import Collator
from veneer.train.encode import IGNORED, Encoder
from veneer.train.evaluate import generate_answers, heldout_loss, same_answer
from veneer.train.forms import examples_from_rows
from veneer.train.loss import keeps_logits, masked_loss, summed_cross_entropy


def test_cross_entropy_and_its_gradient() -> None:
    logits = torch.randn(130, 50, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (130,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(summed_cross_entropy(logits, targets), expected)
    assert torch.autograd.gradcheck(lambda z: summed_cross_entropy(z, targets), logits)


def test_cross_entropy_of_bf16_is_as_good_as_torch_in_fp32() -> None:
    logits = torch.randn(40, 500).bfloat16().requires_grad_()
    targets = torch.randint(0, 500, (40,))
    ours = summed_cross_entropy(logits, targets)
    ours.backward()
    wide = logits.detach().float().requires_grad_()
    theirs = torch.nn.functional.cross_entropy(wide, targets, reduction="sum")
    theirs.backward()
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(logits.grad, wide.grad.bfloat16())


@pytest.mark.parametrize("keep", [True, False])
def test_masked_loss_is_the_models_own_loss(model: Any, tokenizer: Any, keep: bool) -> None:
    encoder = Encoder(tokenizer=tokenizer)
    encoded, _, _ = encoder.encode_all(examples_from_rows(("", row) for row in chat_rows(5)))
    batch = Collator(0)(encoded)
    assert keeps_logits(model)
    with torch.no_grad():
        total, count, _ = masked_loss(model, batch, keep)
    assert count == int((batch["labels"][:, 1:] != IGNORED).sum())
    torch.testing.assert_close(total / count, model(**batch).loss.detach())
    summed, tokens = heldout_loss(model, encoded, 0, batch_size=2)
    assert tokens == count
    assert summed == pytest.approx(float(total), rel=1e-5)
    parts = [heldout_loss(model, encoded, 0, batch_size=2, share=(rank, 2)) for rank in range(2)]
    assert sum(p[1] for p in parts) == count
    assert sum(p[0] for p in parts) == pytest.approx(summed)


def test_batched_answers_equal_single_ones_in_order(model: Any, tokenizer: Any) -> None:
    encoder = Encoder(tokenizer=tokenizer)
    examples = examples_from_rows(("", row) for row in chat_rows(5))
    done: list[int] = []
    together = generate_answers(model, examples, encoder, 3, 8, done.append)
    single = [generate_answers(model, [example], encoder, 1, 8)[0] for example in examples]
    assert together == single
    assert [a.prompt for a in together] == [row["messages"][0]["content"] for row in chat_rows(5)]
    assert sum(done) == 5
    assert model.training is False


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ('{"b": 2, "a": 1}', '{"a":1,"b":2}', True),
        ('{"a": "1"}', '{"a":1}', False),
        ('{"a": true}', '{"a":1}', False),
        ("[1.0]", "[1]", True),
        ('{"a":1} and more', '{"a":1}', False),
        (" Paris\n", "Paris", True),
        ("paris", "Paris", False),
    ],
)
def test_exact_match(answer: str, reference: str, same: bool) -> None:
    assert same_answer(answer, reference) is same
