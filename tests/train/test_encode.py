from __future__ import annotations

from typing import Any

import pytest
import torch

from veneer.train.batches import Collator, LengthGroupedSampler, by_length, pad_left
from veneer.train.encode import IGNORED, EmptyMaskError, Encoded, Encoder, show_mask
from veneer.train.forms import DataError, Example


def chat(*turns: tuple[str, str]) -> Example:
    return Example(place="d.jsonl:7", form="messages", messages=tuple({"role": r, "content": c} for r, c in turns))


def trained_text(encoder: Encoder, example: Example) -> list[str]:
    """The pieces that carry loss, as text."""
    return [text for text, trained in show_mask(encoder.encode(example), encoder.tokenizer) if trained]


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer=tokenizer)


def with_template(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, template: str | None) -> Encoder:
    monkeypatch.setattr(encoder.tokenizer, "chat_template", template)
    return encoder


def test_only_answers_carry_loss_with_their_end_token(encoder: Encoder) -> None:
    example = chat(("system", "S"), ("user", "one"), ("assistant", "ONE"), ("user", "two"), ("assistant", "TWO"))
    assert trained_text(encoder, example) == ["ONE<|im_end|>", "TWO<|im_end|>"]
    one = encoder.encode(example)
    assert one.input_ids[-1] == encoder.tokenizer.eos_token_id, "nothing comes after the last answer"
    assert all(label in (IGNORED, token) for label, token in zip(one.labels, one.input_ids, strict=True))


def test_prompt_of_evaluation_is_the_beginning_of_training(encoder: Encoder) -> None:
    example = chat(("user", "one"), ("assistant", "ONE"))
    prompt, one = encoder.prompt_ids(example), encoder.encode(example)
    assert one.input_ids[: len(prompt)] == prompt
    assert one.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert one.labels[len(prompt)] != IGNORED


def test_an_answer_that_repeats_the_question_is_not_confused_with_it(encoder: Encoder) -> None:
    example = chat(("user", "same"), ("assistant", "same"), ("user", "same"), ("assistant", "same"))
    assert trained_text(encoder, example) == ["same<|im_end|>", "same<|im_end|>"]


def test_train_on_everything(tokenizer: Any) -> None:
    one = Encoder(tokenizer=tokenizer, train_on="everything").encode(chat(("user", "one"), ("assistant", "ONE")))
    assert one.labels[1:] == one.input_ids[1:]
    assert one.labels[0] == IGNORED, "the first token is predicted from nothing"


def test_prompt_completion_and_text(encoder: Encoder) -> None:
    pair = Example(place="p", form="prompt/completion", prompt="2+2=", text="4")
    assert trained_text(encoder, pair) == ["4<|im_end|>"]
    assert encoder.tokenizer.decode(encoder.prompt_ids(pair)) == "2+2="
    plain = Example(place="p", form="text", text="once")
    assert trained_text(encoder, plain) == ["nce<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        # a default system message, an answer wrapped in markers, no line break, an end token before the next turn
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ 'DEFAULT ' }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}",
    ],
)
def test_other_templates(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    with_template(encoder, monkeypatch, template)
    example = chat(("user", "one"), ("assistant", "ONE"), ("user", "two"), ("assistant", "TWO"))
    assert [t.strip() for t in trained_text(encoder, example)] == ["ONE<|im_end|>", "TWO<|im_end|>"]


def test_generation_markers_are_used(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (  # it drops earlier answers' text when more turns follow: beginnings are inconsistent
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] if loop.last else '-' }}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '>' }}{% endif %}{% endfor %}"
    )
    with_template(encoder, monkeypatch, template)
    example = chat(("user", "one"), ("assistant", "ONE"), ("user", "two"), ("assistant", "TWO"))
    assert trained_text(encoder, example) == ["-<|im_end|>", "TWO<|im_end|>"]


def test_inconsistent_template_is_refused_with_the_difference(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else '-') + '<|im_end|>' }}{% endfor %}"
    )
    with_template(encoder, monkeypatch, template)
    example = chat(("user", "one"), ("assistant", "ONE"), ("user", "two"), ("assistant", "TWO"))
    with pytest.raises(DataError, match=r"d.jsonl:7: the chat template renders .* character 5: 'one.* instead of '-"):
        encoder.encode(example)


def test_template_mistakes(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with_template(encoder, monkeypatch, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"d.jsonl:7: .* refuses the roles \[user, assistant\]: roles must alternate"):
        encoder.encode(chat(("user", "a"), ("assistant", "b")))
    with_template(encoder, monkeypatch, None)
    with pytest.raises(DataError, match=r"d.jsonl:7 is a chat, but the tokenizer has no chat template"):
        encoder.encode(chat(("user", "a"), ("assistant", "b")))


def test_empty_mask_shows_the_example(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer=tokenizer, max_length=20)
    with pytest.raises(EmptyMaskError) as caught:
        encoder.encode_all([chat(("user", "a long question that fills it"), ("assistant", "yes"))])
    message = str(caught.value)
    assert message.startswith("d.jsonl:7: the loss mask is empty: after cutting its 52 tokens to data.max_length 20")
    assert "a long question that fills it" in message
    batch = [Encoded(place="x:3", input_ids=[1, 2], labels=[IGNORED, IGNORED])]
    with pytest.raises(EmptyMaskError, match=r"x:3: the loss mask is empty; its tokens: \[1, 2\]"):
        Collator(0)(batch)


def test_too_long(tokenizer: Any) -> None:
    short, long = chat(("user", "a"), ("assistant", "b")), chat(("user", "a"), ("assistant", "b" * 50))
    limit = 45
    cut, count, _ = Encoder(tokenizer=tokenizer, max_length=limit).encode_all([short, long])
    assert (count, [len(e) <= limit for e in cut]) == (1, [True, True])
    skip = Encoder(tokenizer=tokenizer, max_length=limit, too_long="skip")
    kept, _, skipped = skip.encode_all([short, long])
    assert (len(kept), skipped) == (1, 1)
    with pytest.raises(DataError, match=r"all 1 examples are longer than data\.max_length 45"):
        skip.encode_all([long])
    with pytest.raises(DataError, match=r"d.jsonl:7 has 71 tokens, more than data.max_length 45; raise it, or set"):
        Encoder(tokenizer=tokenizer, max_length=limit, too_long="error").encode_all([long])


def test_tokenizer_without_offsets(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    example = chat(("user", "one"), ("assistant", "ONE"), ("user", "two"), ("assistant", "TWO"))
    expected = encoder.encode(example)
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", property(lambda self: False))
    assert encoder.encode(example) == expected


def test_collator_pads_right_and_generation_pads_left() -> None:
    one = Encoded(place="", input_ids=[5, 6, 7], labels=[IGNORED, 6, 7])
    two = Encoded(place="", input_ids=[8, 9], labels=[IGNORED, 9])
    batch = Collator(0)([one, two])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, IGNORED]]
    left = pad_left([[5, 6, 7], [8]], 0)
    assert left["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_length_grouping_saves_padding_and_depends_only_on_seed_and_epoch() -> None:
    lengths = torch.randint(5, 200, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, 8, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(203))
    assert order == list(LengthGroupedSampler(lengths, 8, seed=1))

    def padded(indices: list[int]) -> int:
        batches = [indices[k : k + 8] for k in range(0, len(indices), 8)]
        return sum(len(b) * max(lengths[i] for i in b) for b in batches)

    assert padded(order) < 1.15 * sum(lengths) < padded(list(range(203)))
    sampler.set_epoch(1)
    assert list(sampler) != order
    assert [len(b) for b in by_length(lengths, 64)] == [64, 64, 64, 11]
