"""On-policy distillation: the student writes, the teacher scores every token, reverse KL teaches.

python examples/on_policy.py   # half a minute on a CPU

A small Llama learns on the spot to write four digits backwards, and teaches one of half its width. Share of 500 new
prompts answered right (3 seeds, torch 2.13, CPU): teacher 0.98 to 1.00; student before 0.13 to 0.15, after 0.996 to 1.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from distill import CrossEntropyLoss, Distiller, ReverseKLLoss, next_tokens

DIGITS, SEPARATOR, PROMPT = 4, 10, torch.arange(5)  # a prompt is four digits and a separator, at these places


def llama(width: int) -> Any:
    """A causal language model of two layers."""
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, num_attention_heads=4, eos_token_id=None, **sizes))


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Prompts and their right answers."""
    digits = torch.randint(10, (count, DIGITS))
    return torch.cat([digits, torch.full((count, 1), SEPARATOR)], 1), digits.flip(1)


def pretrain(model: Any, steps: int) -> None:
    """Learn from right answers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens = torch.cat(draw(128), 1)
        target, mask = next_tokens(tokens.index_fill(1, PROMPT, -100))
        optimizer.zero_grad()
        CrossEntropyLoss()(model(tokens).logits, target, mask=mask).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def write(model: Any, prompts: Tensor, *, sample: bool) -> Any:
    """The prompts, continued by the model."""
    return model.generate(prompts, attention_mask=prompts * 0 + 1, do_sample=sample, max_new_tokens=DIGITS)


def share_right(model: Any) -> float:
    """What share of 500 prompts a model answers right, writing what it finds likeliest."""
    prompts, answers = draw(500)
    return float((write(model, prompts, sample=False)[:, DIGITS + 1 :] == answers).all(1).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, teach and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the teacher's training, and of the teaching")
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    student, teacher = llama(24), llama(48)
    pretrain(teacher, steps)
    pretrain(student, steps // 4)
    result = {"teacher": share_right(teacher), "student before": share_right(student)}
    distiller = Distiller(student, teacher, ReverseKLLoss(temperature=1.0), task_loss=None)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    for _ in range(steps):
        written = write(student, draw(128)[0], sample=True)  # no answers are needed
        _, mask = next_tokens(written.index_fill(1, PROMPT, -100))
        optimizer.zero_grad()
        distiller({"input_ids": written}, mask=mask).loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result["student after"] = share_right(student)
    print({name: round(share, 3) for name, share in result.items()})
    return result


if __name__ == "__main__":
    main()
